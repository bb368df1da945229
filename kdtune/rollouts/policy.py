"""Policies: who writes the text of a step."""

from collections.abc import Mapping
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

from kdtune.errors import ConfigError

Source: TypeAlias = Literal["dataset", "student", "teacher", "mixed", "speculative", "replay"]
"""Of a step's text: the answers of the data, those that a model or both write now, or earlier ones from the buffer."""

_ROUNDING = 1e-9  # of shares that add up to 1


@runtime_checkable
class Policy(Protocol):
    """Decides the source of each step; the same on all processes, for it sees nothing that differs between them."""

    @property
    def sources(self) -> frozenset[str]:
        """All that it may choose."""

    def source(self, draw: float, progress: float, *, is_full: bool) -> Source | tuple[Source, ...]:
        """Return the source of a step, or several: a text of each after every prompt, as `Pairs` has it.

        Args:
            draw: random number of the step, uniform in [0, 1), equal on all processes.
            progress: share of the training's steps that are made, 0 to below 1.
            is_full: whether the buffer of earlier texts is full.
        """

    def after_validation(self, metrics: Mapping[str, float]) -> None:
        """Be told the results of a validation, that before the first step included."""

    def state_dict(self) -> dict[str, float]:
        """Return what a resumed run must have again."""

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore it."""


class Share:
    """Constant probabilities of a step's source; the rest of the steps learn from the data (GKD, arXiv 2306.13649).

    Args:
        student: probability that the student writes the step's text, GKD's lambda; 1: always (on-policy distillation).
        teacher: probability that the teacher writes it.
        mixed: probability that both write it: each token is drawn from the mixture of their distributions, with the share
            `teacher_share` of `kdtune.rollouts.Rollouts` (MiniLLM, arXiv 2306.08543).
        speculative: probability that the student drafts it and the teacher corrects it (arXiv 2410.11325).
        replay: probability that earlier texts from the buffer are learned from again; 3/4, with 1/4 of another: each text four times
            on average.

    Raises:
        ConfigError: one is negative, their sum is above 1, or no model writes.
    """

    def __init__(
        self,
        student: float = 0.0,
        teacher: float = 0.0,
        mixed: float = 0.0,
        speculative: float = 0.0,
        replay: float = 0.0,
    ) -> None:
        self._shares: dict[Source, float] = {
            "student": student, "teacher": teacher, "mixed": mixed, "speculative": speculative, "replay": replay,
        }  # fmt: skip
        given, total = ", ".join(f"{name}={share}" for name, share in self._shares.items()), sum(self._shares.values())
        if min(self._shares.values()) < 0 or total > 1 + _ROUNDING:
            raise ConfigError(f"{given}: shares of the steps, from 0 to 1 together")
        if total == replay:
            raise ConfigError(f"{given}: no step has a text of a model; give a share, or leave out rollouts")

    @property
    def sources(self) -> frozenset[str]:
        """All that it may choose."""
        shares = self._shares | {"dataset": 1 - sum(self._shares.values())}
        return frozenset(name for name, share in shares.items() if share > _ROUNDING)

    def source(self, draw: float, progress: float, *, is_full: bool) -> Source:
        """Return the student below its share, the others in the shares after it, the data beyond; see `Policy.source`."""
        upper = 0.0
        for name, share in self._shares.items():
            upper += share
            if draw < upper:
                return name
        return "dataset"

    def after_validation(self, metrics: Mapping[str, float]) -> None:
        """Do nothing."""

    def state_dict(self) -> dict[str, float]:
        """Return {}: the draws depend on seed and step alone."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Do nothing."""


class Pairs:
    """Two texts after each prompt of every step: one that the student writes, and another's (DistiLLM-2, arXiv 2503.07067).

    For `kdtune.losses.BySource`, such as `kdtune.losses.presets.distillm2`, which has a divergence for each of the two. The losses of the
    student's text have the weight b, those of the other 2 - b; a step is divided by the number of all of its targets.

    Args:
        beside: who has written the other text: "teacher", now; or "dataset": it is the data's answer, such as one that the teacher has
            written once (`kdtune run write_answers`), as in the paper.
        student_weight: b at first, above 0 and below 2.
        final_weight: what b rises to, linearly over the first half of the training, 1.5 in the paper; None: it stays, as in the
            authors' code.

    Raises:
        ConfigError: a weight is out of range.
    """

    def __init__(
        self,
        beside: Literal["teacher", "dataset"] = "teacher",
        student_weight: float = 1.0,
        final_weight: float | None = None,
    ) -> None:
        if beside not in ("teacher", "dataset"):
            raise ConfigError(f"beside={beside}: must be teacher or dataset")
        self._beside, self._first = beside, student_weight
        self._last = student_weight if final_weight is None else final_weight
        if not (0 < self._first < 2 and 0 < self._last < 2):
            raise ConfigError(
                f"student_weight={student_weight}, final_weight={final_weight}: must be above 0 and below 2, which the two texts share"
            )

    @property
    def sources(self) -> frozenset[str]:
        """Both."""
        return frozenset({self._beside, "student"})

    def source(self, draw: float, progress: float, *, is_full: bool) -> tuple[Source, ...]:
        """Return both, whatever the draw; see `Policy.source`."""
        return self._beside, "student"

    def weights(self, progress: float) -> dict[Source, float]:
        """Return the factor of the losses of each source's text at a share of the training's steps."""
        student = self._first + (self._last - self._first) * min(1.0, 2 * progress)
        return {self._beside: 2 - student, "student": student}

    def after_validation(self, metrics: Mapping[str, float]) -> None:
        """Do nothing."""

    def state_dict(self) -> dict[str, float]:
        """Return {}: the weights depend on the step alone."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Do nothing."""


class DistiLLMSchedule:
    """Adaptive share of the student's text, with replay (DistiLLM, arXiv 2402.03898, algorithm 1).

    With r the step's draw and phi the adaptive share: below phi * (1 - progress) the student writes, and as long as the buffer is
    not full, below phi; a draw above that and below phi takes earlier texts from the buffer, and all others the data's.
    phi rises by `step` whenever the validation's loss is `threshold` above the one that it is compared with.

    Args:
        start: phi at first.
        step: by how much it rises.
        threshold: nats per token by which the loss must have risen.
        compare_with: "at_rise", as published: the loss at the last rise, first that before training, so that a student which
            was not finetuned first, whose loss only falls, never writes. "previous": that of the validation before, which the paper's
            text says.
        replay: how the share of freshly written text goes with the training: "decreasing", "constant" (half of phi) or "increasing".
        metric: the validation's loss.

    Raises:
        ConfigError: a number is out of range.
    """

    def __init__(
        self,
        start: float = 0.0,
        step: float = 0.1,
        threshold: float = 0.1,
        *,
        compare_with: Literal["at_rise", "previous"] = "at_rise",
        replay: Literal["decreasing", "constant", "increasing"] = "decreasing",
        metric: str = "val_class_loss",
    ) -> None:
        if not (0 <= start <= 1 and 0 < step <= 1 and threshold >= 0):
            raise ConfigError(
                f"start={start}, step={step}, threshold={threshold}: start must lie between 0 and 1, step above 0 and at most at 1, "
                "threshold at 0 or above"
            )
        self.phi, self._step, self._threshold = start, step, threshold
        self._compare_with, self._replay, self.metric = compare_with, replay, metric
        self._before: float | None = None

    @property
    def sources(self) -> frozenset[str]:
        """All that it may choose."""
        return frozenset({"dataset", "student", "replay"})

    def source(self, draw: float, progress: float, *, is_full: bool) -> Source:
        """Return the source as the class describes; see `Policy.source`."""
        fresh = {"decreasing": 1 - progress, "constant": 0.5, "increasing": progress}[self._replay]
        if draw < self.phi * fresh or (draw < self.phi and not is_full):
            return "student"
        return "replay" if draw < self.phi else "dataset"

    def after_validation(self, metrics: Mapping[str, float]) -> None:
        """Raise phi if the loss has risen."""
        loss = metrics.get(self.metric)
        if loss is None:
            raise ConfigError(f"metric={self.metric}: the validation has {', '.join(metrics)}; give one of them")
        if self._before is not None and loss >= self._before + self._threshold:
            self.phi = min(1.0, self.phi + self._step)
        elif self._before is not None and self._compare_with == "at_rise":
            return
        self._before = loss

    def state_dict(self) -> dict[str, float]:
        """Return phi, and the loss that the next one is compared with if there is one."""
        return {"phi": self.phi, **({} if self._before is None else {"before": self._before})}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore it."""
        self.phi, self._before = state_dict["phi"], state_dict.get("before")
