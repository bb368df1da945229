"""Check that tokenizer, teacher and student use the same token ids."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdtune import tokenizers
from kdtune.checkpoint import Checkpointer
from kdtune.errors import CheckpointError, ConfigError, DataError
from kdtune.log import get_logger
from kdtune.losses import ForwardKL, covers_extra_ids, divergence_of
from kdtune.paths import user_path
from kdtune.tokenizers import Tokenizer

log = get_logger(__name__)

_CHAT = ({"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"})


def check_tokenizer(
    tokenizer: Tokenizer,
    checkpointer: Checkpointer | None,
    key: str = "teacher_checkpointer",
    *,
    path: str | Path | None = None,
    is_chat: bool = False,
    same_template: bool = False,
) -> None:
    """Compare the run's tokenizer with the one in a model's folder; log a warning if that folder has none.

    Args:
        tokenizer: the run's.
        checkpointer: the model's, or None: nothing to compare with.
        key: config key of the checkpointer, for the messages. A teacher must share bos and eos too; another model need not (a base model is
            finetuned with the chat tokenizer), so a difference is a warning.
        path: path from which the run's tokenizer was read; a model in the same folder is not compared.
        is_chat: the examples are conversations (`Dataset.is_chat`): warn about a teacher with another chat template.
        same_template: refuse it instead.

    Raises:
        ConfigError: the two give the same text different ids, which mean other tokens to the model; or same_template, and it is another.
    """
    if checkpointer is None:
        return
    folder = Path(checkpointer.checkpoint_dir)
    if path is not None and _folder_of(user_path(path)) == folder.resolve():
        return
    try:
        own = tokenizers.load(folder, date=tokenizer.date)
    except CheckpointError as error:
        log.warning("%s: its tokenizer could not be compared with the run's: %s", key, error)
        return
    if not key.startswith("teacher"):
        _check_model(tokenizer, own, f"tokenizer and {key}={folder}", folder)
        return
    _check_teacher(tokenizer, own, f"tokenizer and {key}={folder}", folder)
    if is_chat and render_question(tokenizer) != render_question(own, tokenizer.chat_template_kwargs):
        problem = (
            f"tokenizer and {key}={folder}: the teacher has another chat template, so it is asked in a format that is not its own; "
            f"tokenizer.path={folder} takes its format"
        )
        if same_template:
            raise ConfigError(f"{problem} (or rollouts.guards.same_template=false)")
        log.warning(problem)


def _check_teacher(tokenizer: Tokenizer, own: Tokenizer, keys: str, folder: Path) -> None:
    if difference := tokenizers.same_ids(tokenizer, own):
        beyond, lacking = (tokenizers.lacking_special_tokens(*pair) for pair in ((own, tokenizer), (tokenizer, own)))
        if beyond is None or lacking is None:
            raise ConfigError(
                f"{keys}: teacher and student have different tokenizers: {difference}; "
                "token by token distillation needs the same one; choose a teacher of the student's family, or a cross-tokenizer kd_loss "
                "(kdtune.losses.ULD, HybridULD, ALM)"
            )
        if len(beyond) >= len(lacking):
            raise ConfigError(
                f"{keys}: teacher and student have the same ids for text, but the teacher has special tokens that the run's tokenizer "
                f"lacks ({_listed(beyond)}), as an instruct model and a base model of one family do; train the student in the teacher's "
                f"format: tokenizer.path={folder}"
            )
        raise ConfigError(
            f"{keys}: teacher and student have the same ids for text, but the run's tokenizer has special tokens that the teacher lacks "
            f"({_listed(lacking)}), as an instruct model and a base model of one family do: the teacher knows nothing of them; choose an "
            f"instruct teacher, or train in the teacher's format: tokenizer.path={folder}"
        )
    if difference := tokenizers.same_tokenizer(tokenizer, own):
        raise ConfigError(
            f"{keys}: teacher and student have the same ids, but {difference}, as an instruct model and "
            f"a base model of one family do; train the student in the teacher's format: tokenizer.path={folder}"
        )


def _check_model(tokenizer: Tokenizer, own: Tokenizer, keys: str, folder: Path) -> None:
    difference = tokenizers.same_ids(tokenizer, own)
    if difference and (beyond := tokenizers.lacking_special_tokens(tokenizer, own)) is not None:
        what = (
            f"the run's tokenizer has special tokens that the model's lacks ({_listed(beyond)})"
            if beyond
            else difference
        )
        log.warning("%s: the same ids for text, but %s; the run goes by its own tokenizer", keys, what)
    elif difference:
        raise ConfigError(
            f"{keys}: the tokenizer is not this model's: {difference}; its ids would be other "
            f"tokens to the model; set tokenizer.path={folder}"
        )
    elif difference := tokenizers.same_tokenizer(tokenizer, own):
        log.warning("%s: %s; the run goes by its own tokenizer", keys, difference)


def _listed(tokens: list[str]) -> str:
    return ", ".join(tokens[:4]) + (f", ... {len(tokens)} in all" if len(tokens) > 4 else "")


def render_question(tokenizer: Tokenizer, variables: Mapping[str, Any] | None = None) -> str | None:
    """Render a short conversation by the tokenizer's chat template, with further variables; None if the template refuses it."""
    try:
        return tokenizer.render(_CHAT, template_variables=variables)
    except DataError:
        return None


def _folder_of(path: Path) -> Path:
    return (path.parent if path.is_file() else path).resolve()


def check_vocabularies(
    tokenizer: Tokenizer, student_vocab_size: int, teacher_vocab_size: int, kd_loss: Any = None
) -> Any:
    """Compare the tokenizer with both heads, and log if one head has rows that the other lacks; return the divergence.

    Of a pair of tokenizers (`kdtune.data.TokenizerPair`) each is compared with its own model's head, and a cross-tokenizer loss
    is returned fitted to the vocabularies.

    `student_vocab_size` and `teacher_vocab_size` are the heads' numbers of rows, `kd_loss` the divergence (None: forward KL), see
    `kdtune.losses.covers_extra_ids`.

    Raises:
        ConfigError: the tokenizer can produce an id for which a model has no row.
    """
    tokenizers.check_vocabulary(tokenizer, student_vocab_size, "student")
    tokenizers.check_vocabulary(tokenizer.pair.teacher if tokenizer.pair else tokenizer, teacher_vocab_size, "teacher")
    if tokenizer.pair:
        from kdtune.teachers.other_tokenizer import fit_loss

        return fit_loss(tokenizer, (student_vocab_size, teacher_vocab_size), kd_loss)
    sizes = f"vocabularies: student {student_vocab_size} rows, teacher {teacher_vocab_size} (padding)"
    if student_vocab_size < teacher_vocab_size:
        log.info("%s; the teacher's softmax is over the first %d ids", sizes, student_vocab_size)
    elif student_vocab_size > teacher_vocab_size:
        what = (
            "cross entropy and divergence are over all of the student's"
            if covers_extra_ids(ForwardKL() if kd_loss is None else divergence_of(kd_loss))
            else f"cross entropy is over all of the student's, the divergence over the first {teacher_vocab_size} ids, "
            "renormalized (for the others it would be infinite)"
        )
        log.info("%s; %s; student_mass_outside is the probability it gives to the others", sizes, what)
    return kd_loss
