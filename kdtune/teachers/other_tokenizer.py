"""A teacher with a tokenizer of its own: which one, and the loss that can compare it with the student."""

from collections.abc import Sequence
from typing import Any

from kdtune import tokenizers
from kdtune.config import instantiate
from kdtune.data import Dataset, TokenizerPair
from kdtune.errors import ConfigError
from kdtune.log import get_logger
from kdtune.teachers.compatibility import render_question
from kdtune.tokenizers import Tokenizer

log = get_logger(__name__)

# Examples that the aligned share is measured on.
_SAMPLE = 64


def pair_with_teacher(cfg: Any, tokenizer: Tokenizer) -> Tokenizer:
    """Return the tokenizer, paired with the teacher's (`TokenizerPair`) where the run's loss compares two tokenizations.

    That is a cross-tokenizer `kd_loss` with a teacher of other ids or another chat template; `ALM` compares the text in any
    case. The teacher's tokenizer is `teacher_tokenizer`, or that of teacher_checkpointer's folder; without either the run's own.

    Raises:
        CheckpointError: the teacher's folder has no tokenizer.
        ConfigError: teacher_tokenizer is no tokenizer.
    """
    loss = instantiate(getattr(cfg, "kd_loss", None))
    if not getattr(loss, "is_cross_tokenizer", False):
        return tokenizer
    source, node = instantiate(cfg.teacher_checkpointer), cfg.teacher_tokenizer
    theirs: Any = tokenizer
    if node is not None:
        theirs = instantiate(node, optional={"date": tokenizer.date})
    elif source is not None:
        theirs = tokenizers.load(source.checkpoint_dir, date=tokenizer.date)
    if not isinstance(theirs, Tokenizer):
        raise ConfigError(
            f"teacher_tokenizer: {node['_component_']} returns a {type(theirs).__name__}, not a tokenizer"
        )
    is_same = tokenizers.same_tokenizer(tokenizer, theirs) is None and render_question(tokenizer) == render_question(
        theirs
    )
    if is_same and not getattr(loss, "of_text", False):
        return tokenizer
    pair: Any = TokenizerPair(tokenizer, theirs)
    return pair


def log_aligned_share(tokenizer: Tokenizer, dataset: Dataset) -> None:
    """Log how much of a paired dataset's first examples the loss compares; nothing for other datasets.

    Raises:
        ConfigError: nothing in them is aligned.
    """
    if tokenizer.pair is None:
        return
    tokenizer.pair.is_chat = dataset.is_chat
    first = [
        example for example, _ in zip(dataset.examples(seed=0, epoch=0, shuffle=False), range(_SAMPLE), strict=False)
    ]
    of_bytes, of_tokens, of_positions = tokenizer.pair.aligned_shares(first)
    if not of_bytes:
        raise ConfigError(
            f"kd_loss: no trained byte of the first {len(first)} examples is aligned with the teacher's tokens: the chat "
            "templates print the contents differently; compare them with `kdtune data`, or set teacher_tokenizer"
        )
    log.info(
        "the teacher has a tokenizer of its own: %.1f %% of the trained bytes (%.1f %% of the tokens) are aligned with its tokens, and "
        "at %.1f %% of the positions both models have read the same text (first %d examples)",
        100 * of_bytes,
        100 * of_tokens,
        100 * of_positions,
        len(first),
    )


def problems(cfg: Any) -> list[str]:
    """Return problems of a distillation config with a cross-tokenizer loss, and keys that only mean something with one."""
    try:
        is_cross = getattr(instantiate(cfg.kd_loss), "is_cross_tokenizer", False)
    except ConfigError:  # said elsewhere
        return []
    if not is_cross:
        needs = "set kd_loss to a cross-tokenizer one (kdtune.losses.ULD, HybridULD, ALM)"
        return (
            [f"teacher_tokenizer: has no effect with this kd_loss; {needs}, or ~teacher_tokenizer"]
            if cfg.teacher_tokenizer
            else []
        )
    found = []
    if cfg.teacher_targets is not None:
        found.append("teacher_targets: has no effect with a cross-tokenizer kd_loss; ~teacher_targets")
    if cfg.loss_logits_dtype is not None:
        found.append(
            f"loss_logits_dtype={cfg.loss_logits_dtype}: a cross-tokenizer kd_loss has its logits in fp32; ~loss_logits_dtype"
        )
    if getattr(cfg, "hidden_loss", None) is not None:
        found.append(
            "hidden_loss: compares the two models position by position, and with a cross-tokenizer kd_loss they read other tokens; "
            "~hidden_loss"
        )
    for key in ("parallelism", "teacher_parallelism"):
        if getattr(instantiate(getattr(cfg, key)), "tp", 1) > 1:
            found.append(f"{key}.tp: a cross-tokenizer kd_loss needs whole output heads; set {key}.tp=1")
    return found


def fit_loss(tokenizer: Tokenizer, sizes: Sequence[int], kd_loss: Any) -> Any:
    """Return the loss for the vocabularies of a pair of tokenizers; sizes: rows of the student's and the teacher's head."""
    if tokenizer.pair is not None and getattr(kd_loss, "debias_threshold", None) is not None:
        return kd_loss.with_word_starts(*tokenizer.pair.word_starts())
    if tokenizer.pair is None or not hasattr(kd_loss, "over"):
        return kd_loss
    student_ids, teacher_ids = tokenizer.pair.shared_ids()
    log.info("vocabularies: %d tokens are in both (student %d, teacher %d)", len(student_ids), *sizes)
    return kd_loss.over(student_ids, teacher_ids, tuple(sizes))
