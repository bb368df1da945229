"""Results of a sweep as rows over seeds, and these as Markdown and CSV."""

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from kdtune._assets import did_you_mean
from kdtune.escape import csv_value, markdown_table, markdown_text
from kdtune.sweeps.grid import is_listed
from kdtune.sweeps.plan import Plan, label, shown_value
from kdtune.sweeps.results import DONE
from kdtune.sweeps.statistics import Difference, Summary, difference, summarize

SEED = "seed"
_STANDARD_ERROR = "_stderr"


@dataclass(frozen=True)
class Row:
    """The finished cells that differ in nothing but the seed."""

    axes: Mapping[str, Any]
    cells: tuple[Mapping[str, Any], ...]

    @property
    def name(self) -> str:
        """The row's axis values in one line."""
        return label(self.axes) or "all cells"

    def values(self, metric: str) -> dict[Any, float]:
        """The metric of each cell that has it as a finite number, by seed."""
        found = {cell["axes"].get(SEED): cell["metrics"].get(metric) for cell in self.cells}
        return {seed: value for seed, value in found.items() if value is not None and math.isfinite(value)}

    def counts(self, metric: str) -> tuple[int, int]:
        """How many cells have the metric as a finite number, of how many; (0, 0) where none has measured it."""
        measured = any(metric in cell["metrics"] for cell in self.cells)
        return len(self.values(metric)), len(self.cells) if measured else 0

    def document_error(self, metric: str) -> float | None:
        """Of one seed: the task's own standard error of the metric, over its documents; None where it gives none."""
        name, comma, answer_filter = metric.partition(",")
        errors = self.values(f"{name}{_STANDARD_ERROR}{comma}{answer_filter}")
        values = self.values(metric)
        return errors.get(next(iter(values))) if len(values) == 1 else None

    def summary(self, metric: str) -> Summary | None:
        """Mean and standard error of a metric; None where no cell has it."""
        values = self.values(metric)
        return summarize(list(values.values())) if values else None


def rows_over_seeds(results: Iterable[Mapping[str, Any]]) -> list[Row]:
    """The finished cells of a results.jsonl, grouped by all axes but `seed`, in order of first appearance.

    Of several cells of one row and seed, which would count a run twice, the first is kept (see `repeated_cells`).
    """
    groups: dict[str, dict[Any, Mapping[str, Any]]] = {}
    for cell in results:
        if cell["status"] == DONE:
            groups.setdefault(_row_key(cell), {}).setdefault(cell["axes"].get(SEED), cell)
    return [
        Row(_without_seed(next(iter(of_seed.values()))["axes"]), tuple(of_seed.values())) for of_seed in groups.values()
    ]


def repeated_cells(results: Iterable[Mapping[str, Any]]) -> list[str]:
    """The finished cells that are of one row and seed, a sentence for each such row and seed with their line numbers."""
    lines: dict[tuple[str, Any], list[int]] = {}
    names: dict[tuple[str, Any], str] = {}
    for number, cell in enumerate(results, start=1):
        if cell["status"] == DONE:
            key = (_row_key(cell), cell["axes"].get(SEED))
            lines.setdefault(key, []).append(number)
            names.setdefault(key, label(cell["axes"]) or "the only cell")
    return [
        f"results: lines {', '.join(map(str, found[:-1]))} and {found[-1]} are {'both' if len(found) == 2 else 'all'} of one "
        f"row and seed, {names[key]}; keep one of them, or tell them apart by an axis"
        for key, found in lines.items()
        if len(found) > 1
    ]


def _row_key(cell: Mapping[str, Any]) -> str:
    return json.dumps(_without_seed(cell["axes"]), sort_keys=True)


def _without_seed(axes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in axes.items() if name != SEED}


def axis_names(rows: Sequence[Row]) -> list[str]:
    """The axes of the rows, in order of first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row.axes))


def known_metrics(rows: Sequence[Row]) -> list[str]:
    """Every metric that a cell of the rows has, in order of first appearance."""
    return list(dict.fromkeys(name for row in rows for cell in row.cells for name in cell["metrics"]))


def chosen_metrics(rows: Sequence[Row], patterns: Sequence[str] | None) -> list[str]:
    """The metrics to show: those that fit a pattern, in the patterns' order.

    Where there are no patterns (None), or none that fits, they are all but standard errors.
    """
    known = known_metrics(rows)
    found = [name for pattern in patterns or () for name in known if fnmatchcase(name, pattern)]
    shown = [name for name in known if not name.partition(",")[0].endswith(_STANDARD_ERROR)]
    return list(dict.fromkeys(found)) or ([] if patterns == [] else shown)


def metric_problems(rows: Sequence[Row], patterns: Sequence[str] | None) -> list[str]:
    """The patterns that fit no metric, a sentence each that names the nearest; [] while no cell has any."""
    known = known_metrics(rows)
    return [
        f"metrics: {pattern!r} fits none of the results{did_you_mean(pattern, known)}; there are {', '.join(known)}"
        for pattern in patterns or ()
        if known and not any(fnmatchcase(name, pattern) for name in known)
    ]


def baseline_row(rows: Sequence[Row], baseline: Mapping[str, Any] | None) -> Row | None:
    """The one row whose axes have the baseline's values; None without a baseline, or where not exactly one has them."""
    found = _fitting_rows(rows, baseline) if baseline else []
    return found[0] if len(found) == 1 else None


def row_problems(rows: Sequence[Row], baseline: Mapping[str, Any] | None) -> list[str]:
    """Why the baseline is none of the rows, in a sentence; [] without a baseline, without rows, and where it is one."""
    found = _fitting_rows(rows, baseline) if baseline else []
    if not baseline or not rows or len(found) == 1:
        return []
    names = "; ".join(row.name for row in (found or rows))
    count = "no row has" if not found else f"{len(found)} rows have"
    return [f"baseline: {count} {label(baseline)}; name one row by its axes: {names}; or none: ~baseline"]


def baseline_problems(plan: Plan, baseline: Mapping[str, Any] | None) -> list[str]:
    """Why the baseline will be no row of the report, once every cell of a sweep is finished; [] where it will be one."""
    cells = [{"axes": cell.axes, "status": DONE, "metrics": {}} for cell in plan.whole]
    return row_problems(rows_over_seeds(cells), baseline)


def _fitting_rows(rows: Sequence[Row], values: Mapping[str, Any]) -> list[Row]:
    return [
        row
        for row in rows
        if all(axis in row.axes and is_listed(value, [row.axes[axis]]) for axis, value in values.items())
    ]


def row_difference(row: Row, baseline: Row | None, metric: str) -> Difference | None:
    """How a row differs from the baseline in a metric; None for the baseline itself and where either lacks it."""
    if baseline is None or row is baseline:
        return None
    values, others = row.values(metric), baseline.values(metric)
    return difference(values, others) if values and others else None


def short_names(metrics: Sequence[str]) -> dict[str, str]:
    """The metrics' names without their step where that leaves them different."""
    bare = {metric: metric.partition(".")[2] or metric for metric in metrics}
    return {metric: name if list(bare.values()).count(name) == 1 else metric for metric, name in bare.items()}


def summary_table(rows: Sequence[Row], metrics: Sequence[str]) -> str:
    """Mean ± standard error of every metric in every row, as Markdown (see `mean_text`)."""
    axes, names = axis_names(rows), short_names(metrics)
    lines = [
        [*_axis_cells(row, axes), str(len(row.cells)), *(mean_text(row, metric) for metric in metrics)] for row in rows
    ]
    return markdown_table([*axes, "n", *(names[metric] for metric in metrics)], lines, num_text=len(axes))


def difference_table(rows: Sequence[Row], metrics: Sequence[str], baseline: Row) -> str:
    """Every row's difference to the baseline as Markdown (see `difference_text`), bold beyond the bound of Student's t."""
    axes, names = axis_names(rows), short_names(metrics)
    lines = [
        [*_axis_cells(row, axes), *(_emphasized(row_difference(row, baseline, metric)) for metric in metrics)]
        for row in rows
        if row is not baseline
    ]
    return markdown_table([*axes, *(names[metric] for metric in metrics)], lines, num_text=len(axes))


def _axis_cells(row: Row, axes: Sequence[str]) -> list[str]:
    return [markdown_text(shown_value(row.axes[axis])) if axis in row.axes else "-" for axis in axes]


def mean_text(row: Row, metric: str) -> str:
    """`0.4512 ± 0.0021`: a row's mean and its standard error over seeds; `-` for none.

    Of one seed `0.4512 ± 0.0140 d` with the task's own standard error over documents, `0.4512 ± -` where it gives none.
    ` (2 of 3)` follows where not every cell has a finite number.
    """
    summary, (num_finite, num_cells) = row.summary(metric), row.counts(metric)
    text = "-"
    if summary is not None:
        over_documents = row.document_error(metric)
        error = over_documents if summary.standard_error is None else summary.standard_error
        text = f"{summary.mean:.4f} ± " + ("-" if error is None else f"{error:.4f}")
        text += " d" if over_documents is not None else ""
    return text if num_finite == num_cells else f"{text} ({num_finite} of {num_cells})"


def difference_text(found: Difference | None) -> str:
    """`+0.0120 (+2.4 p, n 3)`: the difference, in standard errors, paired by seed and of how many seeds.

    Of two samples `+0.0120 (+2.4 t, n 3, 2)`; `-` for the standard errors where there are none.
    """
    if found is None:
        return "-"
    ratio = "-" if found.in_standard_errors is None else f"{found.in_standard_errors:+.1f}"
    how = f"p, n {found.counts[0]}" if found.kind == "paired" else f"t, n {found.counts[0]}, {found.counts[1]}"
    return f"{found.value:+.4f} ({ratio} {how})"


def _emphasized(found: Difference | None) -> str:
    text = difference_text(found)
    return f"**{text}**" if found is not None and found.is_beyond_bound else text


def csv_table(rows: Sequence[Row], metrics: Sequence[str], baseline: Row | None) -> str:
    """The rows as CSV, numbers unrounded, an empty field where there is none.

    Columns: the axes, n (cells), and for each metric M: M, M:standard_error (over seeds), M:n (finite values; 0 where all
    were not finite), M:document_error where a row of one seed has the task's own and, with a baseline, M:difference,
    M:difference_in_standard_errors, M:bound (of that, Student's t, 5 %) and M:comparison (paired or two-sample).
    """
    axes = axis_names(rows)
    with_documents = [metric for metric in metrics if any(row.document_error(metric) is not None for row in rows)]
    lines = []
    for row in rows:
        line: dict[str, Any] = {
            _axis_column(axis, "n"): shown_value(row.axes[axis]) if axis in row.axes else None for axis in axes
        }
        line["n"] = len(row.cells)
        for metric in metrics:
            summary, found = row.summary(metric), row_difference(row, baseline, metric)
            line[metric] = summary and summary.mean
            line[f"{metric}:standard_error"] = summary and summary.standard_error
            num_finite, num_cells = row.counts(metric)
            line[f"{metric}:n"] = num_finite if num_cells else None
            if metric in with_documents:
                line[f"{metric}:document_error"] = row.document_error(metric)
            if baseline is not None:
                line[f"{metric}:difference"] = found and found.value
                line[f"{metric}:difference_in_standard_errors"] = found and found.in_standard_errors
                line[f"{metric}:bound"] = found and found.bound
                line[f"{metric}:comparison"] = found and found.kind
        lines.append(line)
    return _csv_text(lines)


def csv_cells(results: Iterable[Mapping[str, Any]]) -> str:
    """Every cell of a results.jsonl as a CSV line: status, axes, metrics, seconds of each step."""
    lines = [
        {
            "status": cell["status"],
            **{_axis_column(axis, "status"): shown_value(value) for axis, value in cell["axes"].items()},
            **cell["metrics"],
            **{f"{step}.seconds": value for step, value in cell["seconds"].items()},
        }
        for cell in results
    ]
    return _csv_text(lines)


def _axis_column(axis: str, taken: str) -> str:
    """The column of an axis, which must not be one that the table has of its own."""
    return f"axis:{axis}" if axis == taken else axis


def _csv_text(lines: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    columns = list(dict.fromkeys(key for line in lines for key in line))
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(csv_value, columns))
    writer.writerows([csv_value(line.get(column)) for column in columns] for line in lines)
    return text.getvalue()
