"""Mean and standard error over seeds, and the difference of two rows in units of its standard error."""

import bisect
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

# Degrees of freedom -> the bound that |t| exceeds with 5 % chance: 0.975 quantiles of Student's t distribution, as in the
# NIST/SEMATECH e-Handbook of Statistical Methods, section 1.3.6.7.2 (the tests compare them with scipy's).
_T_BOUNDS = {
    **dict(enumerate((12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228), start=1)),
    **dict(enumerate((2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086), start=11)),
    **dict(enumerate((2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042), start=21)),
    40: 2.021, 60: 2.000, 100: 1.984,
}  # fmt: skip


@dataclass(frozen=True)
class Summary:
    """Mean of n values and its standard error s / sqrt(n), s with n - 1 degrees of freedom; None for n = 1."""

    mean: float
    standard_error: float | None
    n: int


@dataclass(frozen=True)
class Difference:
    """Difference of two means, its ratio to its standard error (None if that is unknown or 0), and the kind of comparison.

    `counts` are the numbers of values on both sides, `degrees` the degrees of freedom of the ratio (None if the ratio is).
    """

    value: float
    in_standard_errors: float | None
    kind: Literal["paired", "two-sample"]
    counts: tuple[int, int]
    degrees: float | None

    @property
    def bound(self) -> float | None:
        """Value that |in_standard_errors| exceeds with 5 % probability if there is no difference (Student's t, two-sided)."""
        return None if self.degrees is None else t_bound(self.degrees)

    @property
    def is_beyond_bound(self) -> bool:
        """Return whether the difference is larger than seeds alone explain, at the 5 % level."""
        return (
            self.in_standard_errors is not None and self.bound is not None and abs(self.in_standard_errors) > self.bound
        )


def t_bound(degrees: float) -> float:
    """Return the two-sided 5 % bound of Student's t; between two table entries that of the lower degrees (a wider bound)."""
    known = list(_T_BOUNDS)
    return _T_BOUNDS[known[max(0, bisect.bisect_right(known, degrees + 1e-9) - 1)]]


def summarize(values: Sequence[float]) -> Summary:
    """Return mean and standard error of at least one value."""
    n = len(values)
    error = statistics.stdev(values) / math.sqrt(n) if n > 1 else None
    return Summary(statistics.fmean(values), error, n)


def difference(values: Mapping[Any, float], baseline: Mapping[Any, float]) -> Difference:
    """Return the difference between the mean of values and the baseline's, both keyed by seed.

    With the same two or more seeds on both sides the test is paired: mean / (s / sqrt(n)) of the differences. Otherwise it
    is Welch's two-sample test: the standard error is sqrt(s1^2 / n1 + s2^2 / n2), with the degrees of freedom of Welch and
    Satterthwaite.
    """
    counts = (len(values), len(baseline))
    value = statistics.fmean(values.values()) - statistics.fmean(baseline.values())
    if set(values) == set(baseline) and len(values) > 1:
        error = summarize([values[seed] - baseline[seed] for seed in values]).standard_error
        return _difference(value, error, "paired", counts, len(values) - 1)
    errors = [summarize(list(side.values())).standard_error for side in (values, baseline)]
    known = [error for error in errors if error is not None]
    error = math.hypot(*known)
    if len(known) < 2 or not error:
        return _difference(value, None, "two-sample", counts, 0)
    degrees = 1 / sum((part / error) ** 4 / (count - 1) for part, count in zip(known, counts, strict=True))
    return _difference(value, error, "two-sample", counts, degrees)


def _difference(
    value: float, error: float | None, kind: Literal["paired", "two-sample"], counts: tuple[int, int], degrees: float
) -> Difference:
    ratio, degrees_or_none = (value / error, degrees) if error else (None, None)
    return Difference(value, ratio, kind, counts, degrees_or_none)
