"""What the rollouts of a step look like, and when a run should stop because of it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdtune.errors import ConfigError, TrainingError
from kdtune.rollouts.record import Rollout

# Tokens of a sequence that counts as repeated if it has been there before, as in rep-4 of arXiv 1908.04319.
_REPEATED = 4
# Tokens of a step at which both models' most likely ids are compared: enough to see a trend, too few to cost time.
NUM_WATCHED = 64


def describe(rollouts: Sequence[Rollout], step: int) -> dict[str, float]:
    """Return means over some rollouts, at least one, that are learned from at an optimizer step.

    "rollout_tokens" of the answers; "rollout_cut_share" of those that the limit cut; "rollout_repetition", the share of an answer's
    sequences of 4 tokens that it has had before; "rollout_entropy", -log q of the answers' tokens, in nats: of the student's own text at
    temperature 1 an estimate of its entropy; "rollout_staleness", optimizer steps since they were written.
    """
    found = {
        "rollout_tokens": float(np.mean([one.answer_length for one in rollouts])),
        "rollout_cut_share": float(np.mean([not one.is_finished for one in rollouts])),
        "rollout_repetition": float(np.mean([_repetition(one) for one in rollouts])),
        "rollout_staleness": float(np.mean([step - one.step for one in rollouts])),
    }
    log_probs = [one.log_probs for one in rollouts if one.log_probs is not None]
    if log_probs:
        found["rollout_entropy"] = -float(np.concatenate(log_probs).mean(dtype=np.float64))
    return found


def _repetition(rollout: Rollout) -> float:
    answer = rollout.tokens[rollout.prompt_length :].tolist()
    grams = [tuple(answer[start : start + _REPEATED]) for start in range(len(answer) - _REPEATED + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def watched(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Return the texts of a step that its metrics describe: the student's, which may go wrong, or, without one, the teacher's."""
    return [one for one in rollouts if one.source != "teacher"] or list(rollouts)


def watched_targets(rollouts: Sequence[Rollout], parts: Sequence[Sequence[int]]) -> list[Tensor | None]:
    """Return indices, int64, of those targets of each micro-batch that are among 64 at equal distances, or all if there are fewer.

    Of the texts of `watched`; None for a micro-batch of others. They depend on the step's texts alone, however these are laid out.

    Args:
        rollouts: the step's, on all processes, ordered.
        parts: which of them each micro-batch has.
    """
    writers = {one.source for one in watched(rollouts)}
    ends = np.cumsum([one.answer_length if one.source in writers else 0 for one in rollouts])
    chosen = np.unique(np.arange(NUM_WATCHED) * int(ends[-1]) // NUM_WATCHED)
    found: list[Tensor | None] = []
    for part in parts:
        if any(rollouts[index].source not in writers for index in part):
            found.append(None)
            continue
        tokens = [np.arange(ends[index] - rollouts[index].answer_length, ends[index]) for index in part]
        is_chosen = np.isin(np.concatenate([np.zeros(0, dtype=np.int64), *tokens]), chosen)
        found.append(torch.from_numpy(np.flatnonzero(is_chosen)))
    return found


def watched_means(row: Mapping[str, float], num_tokens: int) -> dict[str, float]:
    """Return the means of what the loss has added up of watched targets, from a step's `row` of means over all of its targets.

    `num_tokens` are those of the watched texts.

    "rollout_log_ratio", log q - log p over all tokens, q the student's probability and p the teacher's: on the student's own text at
    temperature 1 an estimate of the reverse KL. "rollout_overlap", the share of ids that are among the 16 most likely of both
    models, over the 64 tokens of `watched_targets`.
    """
    names = {"log_ratio": "rollout_log_ratio", "overlap": "rollout_overlap"}
    counts = {"log_ratio": num_tokens, "overlap": min(num_tokens, NUM_WATCHED)}
    found = {ours: row[name] * (row["num_valid_tokens"] / counts[name]) for name, ours in names.items() if name in row}
    return {**{name: value for name, value in row.items() if name not in names}, **found}


class Guards:
    """Reasons to stop a run that learns from texts of its own: each comes with its threshold, null turns it off.

    Args:
        max_teacher_loss: largest cross entropy of the teacher with the held-out data, as a multiple of that of equal probabilities,
            log(vocabulary): above it, the teacher is broken. One that is asked in another chat template than its own stays below.
        max_cut_share: largest share of a step's texts that the limit cuts.
        min_entropy: least entropy of what is written, in nats per token: below it the student says the same whatever it is asked. Of the
            student's own text alone, and not at temperature 0.
        patience: number of steps in a row, of those in which a model writes, that must be above max_cut_share, or below min_entropy,
            for the run to stop.
        same_template: refuse, before weights are read, a teacher whose folder (`teacher_checkpointer`) has another chat template than the
            conversations of the data are written in; False: warn.

    Raises:
        ConfigError: a number is out of range.
    """

    def __init__(
        self,
        max_teacher_loss: float | None = 1.0,
        max_cut_share: float | None = 0.95,
        min_entropy: float | None = 0.01,
        patience: int = 20,
        same_template: bool = True,
    ) -> None:
        for name, value in (
            ("max_teacher_loss", max_teacher_loss),
            ("max_cut_share", max_cut_share),
            ("min_entropy", min_entropy),
        ):
            if value is not None and value < 0:
                raise ConfigError(f"{name}={value}: must be 0 or more, or null for no such guard")
        if patience < 1:
            raise ConfigError(f"patience={patience}: must be 1 or more steps")
        self.max_teacher_loss, self.max_cut_share, self.min_entropy = max_teacher_loss, max_cut_share, min_entropy
        self.patience, self.same_template = patience, same_template
        self._in_a_row = {"cut": 0, "entropy": 0}

    def check_teacher(self, metrics: Mapping[str, float], vocab_size: int) -> None:
        """Raise TrainingError if a validation's metrics show a teacher that is worse than no teacher."""
        loss, uniform = metrics.get("val_teacher_class_loss"), math.log(vocab_size)
        if loss is None or self.max_teacher_loss is None or loss <= self.max_teacher_loss * uniform:
            return
        raise TrainingError(
            f"the teacher's cross entropy with the held-out answers is {loss:.3g} nats per token, and that of equal probabilities for all "
            f"{vocab_size} ids is {uniform:.3g}: nothing can be learned from it; check its weights and its tokenizer (or "
            "raise rollouts.guards.max_teacher_loss)"
        )

    def check(self, metrics: Mapping[str, float], *, is_drawn: bool) -> None:
        """Raise TrainingError if the texts of the last steps, of which `describe` says these metrics, leave nothing to learn.

        is_drawn: they are the student's own and drawn; False: of another writer, or each token is the most likely one.
        """
        cut, entropy = metrics["rollout_cut_share"], metrics.get("rollout_entropy")
        is_cut = self.max_cut_share is not None and cut > self.max_cut_share
        is_flat = self.min_entropy is not None and is_drawn and entropy is not None and entropy < self.min_entropy
        for name, is_bad in (("cut", is_cut), ("entropy", is_flat)):
            self._in_a_row[name] = self._in_a_row[name] + 1 if is_bad else 0
        if self._in_a_row["cut"] >= self.patience:
            raise TrainingError(
                f"{cut:.0%} of the texts were cut by the limit, and more than {self.max_cut_share:.0%} in each of the last {self.patience} "
                "steps with text of a model: no end is learned from them; raise rollouts.max_new_tokens, begin with a student "
                "that is finetuned, or raise rollouts.guards.max_cut_share"
            )
        if self._in_a_row["entropy"] >= self.patience:
            raise TrainingError(
                f"the texts have an entropy of {entropy:.2g} nats per token, and less than {self.min_entropy:g} in each of the last "
                f"{self.patience} steps with text of a model: the student has collapsed to few texts; use a share of forward KL or of the "
                "data's text, a smaller learning rate, or lower rollouts.guards.min_entropy"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return how many steps in a row there were."""
        return dict(self._in_a_row)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore it."""
        self._in_a_row = {name: state_dict[name] for name in self._in_a_row}
