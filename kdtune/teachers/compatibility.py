"""Whether a teacher and a student speak of the same tokens."""

from pathlib import Path
from typing import Any

from kdtune import tokenizers
from kdtune.config import instantiate
from kdtune.errors import CheckpointError, ConfigError
from kdtune.log import get_logger
from kdtune.tokenizers import Tokenizer

log = get_logger(__name__)


def check_tokenizer(tokenizer: Tokenizer, teacher_checkpointer: Any) -> None:
    """Compares the run's tokenizer with the one in the teacher's folder; a warning where that folder has none.

    Raises:
        ConfigError: if the same text becomes other ids, since the two distributions are then over different tokens.
    """
    checkpointer = instantiate(teacher_checkpointer)
    if checkpointer is None:
        return
    folder = Path(checkpointer.checkpoint_dir)
    try:
        teacher_tokenizer = tokenizers.load(folder)
    except CheckpointError as error:
        log.warning("teacher_checkpointer: its tokenizer could not be compared with the student's: %s", error)
        return
    difference = tokenizers.same_tokenizer(tokenizer, teacher_tokenizer)
    if difference:
        raise ConfigError(
            f"tokenizer and teacher_checkpointer={folder}: teacher and student have different tokenizers: {difference}; "
            "token by token distillation needs the same one; choose a teacher of the student's family"
        )


def check_vocabularies(tokenizer: Tokenizer, student_vocab_size: int, teacher_vocab_size: int) -> None:
    """Compares the tokenizer with both heads, and says so where the heads are cut to the ids that they share.

    Raises:
        ConfigError: if the tokenizer can produce an id that a model has no row for.
    """
    tokenizers.check_vocabulary(tokenizer, student_vocab_size, "student")
    tokenizers.check_vocabulary(tokenizer, teacher_vocab_size, "teacher")
    if student_vocab_size != teacher_vocab_size:
        log.info(
            "vocabularies: student %d rows, teacher %d (padding); both heads are cut to the first %d ids in the loss",
            student_vocab_size,
            teacher_vocab_size,
            min(student_vocab_size, teacher_vocab_size),
        )
