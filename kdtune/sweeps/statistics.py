"""Mean and standard error over seeds, and the difference of two rows in units of its standard error."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Summary:
    """Mean of n values and its standard error s / sqrt(n), s with n - 1 degrees of freedom; None for n = 1."""

    mean: float
    standard_error: float | None
    n: int


@dataclass(frozen=True)
class Difference:
    """Difference of two means, itself divided by its standard error (None where that is unknown or 0), and how."""

    value: float
    in_standard_errors: float | None
    kind: Literal["paired", "two-sample"]


def summarize(values: Sequence[float]) -> Summary:
    """Mean and standard error of at least one value."""
    n = len(values)
    error = statistics.stdev(values) / math.sqrt(n) if n > 1 else None
    return Summary(statistics.fmean(values), error, n)


def difference(values: Mapping[Any, float], baseline: Mapping[Any, float]) -> Difference:
    """How far the mean of values lies from the baseline's, both keyed by seed.

    With the same two or more seeds on both sides, the pairs' differences are taken: mean / (s / sqrt(n)). Otherwise the
    two means stand apart (Welch): the standard error is sqrt(s1^2 / n1 + s2^2 / n2).
    """
    value = statistics.fmean(values.values()) - statistics.fmean(baseline.values())
    if set(values) == set(baseline) and len(values) > 1:
        error = summarize([values[seed] - baseline[seed] for seed in values]).standard_error
        return Difference(value, _ratio(value, error), "paired")
    errors = [summarize(list(side.values())).standard_error for side in (values, baseline)]
    known = [error for error in errors if error is not None]
    return Difference(value, _ratio(value, math.hypot(*known) if len(known) == 2 else None), "two-sample")


def _ratio(value: float, error: float | None) -> float | None:
    return value / error if error else None
