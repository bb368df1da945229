"""The baseline of a report: one row for all others, or for each row the one that differs in a few axes only."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdtune.reports.rows import Row, rows_over_seeds
from kdtune.reports.statistics import Difference, difference
from kdtune.sweeps.grid import is_listed
from kdtune.sweeps.plan import Plan, label
from kdtune.sweeps.results import DONE


@dataclass(frozen=True)
class Baseline:
    """The rows with these axis values, which the others are compared with.

    With `matched`, a row's counterpart is the one with the same value of every other axis that the row uses; without,
    `rows` is one row, the counterpart of all others.
    """

    values: Mapping[str, Any]
    rows: tuple[Row, ...]
    matched: bool

    @property
    def name(self) -> str:
        """Return the name of what a row is compared with, for a sentence: `kd_ratio=0.0 lr=0.01`."""
        if self.matched:
            return f"the row with {label(self.values)} and otherwise the same axis values"
        return self.rows[0].name

    def counterpart(self, row: Row) -> Row | None:
        """Return the row that a row is compared with; None for a baseline itself, and if there is none."""
        if row in self.rows:
            return None
        if not self.matched:
            return self.rows[0]
        return _nearest(row, self.rows, self.values)

    def difference(self, row: Row, metric: str) -> Difference | None:
        """Return the difference of a row from its counterpart in a metric; None without one, or if either lacks the metric."""
        other = self.counterpart(row)
        values, others = row.values(metric), other.values(metric) if other else {}
        return difference(values, others) if values and others else None


def find_baseline(
    rows: Sequence[Row], values: Mapping[str, Any] | None, planned: Sequence[Row] | None = None
) -> Baseline | None:
    """Return the baseline with these axis values; None without values, or if `row_problems` finds that there is none.

    Args:
        rows: the finished rows.
        values: values of some axes. If one row has them, all others are compared with it; if several have them, each other row
            is compared with the one that differs from it only in these axes.
        planned: all rows of the finished sweep; they decide whether one row has the values or several, so that a
            comparison means the same from the first report on. None: `rows`.
    """
    if not values or row_problems(rows, values, planned):
        return None
    fitting = tuple(_fitting_rows(rows, values))
    matched = len(_fitting_rows(rows if planned is None else planned, values)) > 1
    return Baseline(values, fitting, matched) if fitting else None


def row_problems(
    rows: Sequence[Row], values: Mapping[str, Any] | None, planned: Sequence[Row] | None = None
) -> list[str]:
    """Return why no row can be compared with the baseline, in a sentence; [] without a baseline or rows, and if one can."""
    if not values or not rows:
        return []
    fitting = _fitting_rows(rows, values)
    if not fitting:
        return [f"baseline: no row has {label(values)}; name one row by its axes: {_names(rows)}"]
    if len(_fitting_rows(rows if planned is None else planned, values)) == 1:
        return []
    others = [row for row in rows if row not in fitting]
    if any(_nearest(row, fitting, values) for row in others):
        return []
    return [
        f"baseline: {len(fitting)} rows have {label(values)}, and no other row is equal to one of them in all other axes; "
        f"name one row by its axes: {_names(fitting)}"
    ]


def baseline_problems(plan: Plan, values: Mapping[str, Any] | None) -> list[str]:
    """Return why there will be no baseline once every cell of a sweep is finished; [] if there will be one."""
    return row_problems(planned_rows(cell.axes for cell in plan.whole), values)


def planned_rows(axes: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Return the rows of cells with these axis values, finished or not; they have no metrics."""
    return rows_over_seeds({"axes": one, "status": DONE, "metrics": {}} for one in axes)


def _fitting_rows(rows: Sequence[Row], values: Mapping[str, Any]) -> list[Row]:
    return [
        row
        for row in rows
        if all(axis in row.axes and is_listed(value, [row.axes[axis]]) for axis, value in values.items())
    ]


def _nearest(row: Row, baselines: Sequence[Row], values: Mapping[str, Any]) -> Row | None:
    """Return the baseline whose other axes have the row's values; of several, the one that shares most axes, if it is unique."""
    equal = [
        one
        for one in baselines
        if all(
            axis in row.axes and is_listed(one.axes[axis], [row.axes[axis]]) for axis in one.axes if axis not in values
        )
    ]
    most = max((len(one.axes) for one in equal), default=0)
    nearest = [one for one in equal if len(one.axes) == most]
    return nearest[0] if len(nearest) == 1 else None


def _names(rows: Sequence[Row]) -> str:
    """Return the allowed choices, for a message."""
    return "; ".join([*(row.name for row in rows), "or none: ~baseline"])
