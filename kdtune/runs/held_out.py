"""Held-out metrics of a run's model before and after training, and of the teacher: the numbers of every table of results."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

CLASS_LOSS = "val_class_loss"
_TEACHER_LOSS = "val_teacher_class_loss"


class HeldOut(NamedTuple):
    """Held-out metrics of a model, per token; None for what was not measured or not finite."""

    class_loss: float | None
    kd_loss: float | None
    agreement: float | None
    forward_kl: float | None = None

    @property
    def perplexity_text(self) -> str | None:
        """Format exp(cross entropy) with four digits; a value beyond a float's range is capped."""
        return None if self.class_loss is None else f"{math.exp(min(self.class_loss, 700)):.4g}"

    @property
    def agreement_text(self) -> str | None:
        """Format the share of tokens for which teacher and model have the same most likely token, in percent."""
        return None if self.agreement is None else f"{self.agreement:.1%}"


def held_out(row: Mapping[str, Any]) -> HeldOut:
    """Return the metrics in a row of metrics.jsonl that has a validation."""
    return HeldOut(row[CLASS_LOSS], row.get("val_kd_loss"), row.get("val_agreement"), row.get("val_forward_kl"))


def teacher_held_out(rows: Sequence[Mapping[str, Any]]) -> HeldOut | None:
    """Return the teacher's metrics, from the first row that has them; it agrees with itself."""
    losses = (row[_TEACHER_LOSS] for row in rows if row.get(_TEACHER_LOSS) is not None)
    return next((HeldOut(loss, 0.0, 1.0, 0.0) for loss in losses), None)


def validated_rows(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the rows that have a validation: the first is before training, the last after it."""
    return [row for row in rows if CLASS_LOSS in row]
