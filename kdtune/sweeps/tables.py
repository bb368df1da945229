"""Results of a sweep as rows over seeds, and these as Markdown and CSV."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from kdtune._assets import did_you_mean
from kdtune.errors import ConfigError
from kdtune.sweeps.plan import label, shown_value
from kdtune.sweeps.results import DONE
from kdtune.sweeps.statistics import Difference, Summary, difference, summarize

SEED = "seed"
_STANDARD_ERRORS = "*_stderr"


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
        """The metric of each cell that has it, by seed."""
        return {
            cell["axes"].get(SEED): cell["metrics"][metric]
            for cell in self.cells
            if cell["metrics"].get(metric) is not None
        }

    def summary(self, metric: str) -> Summary | None:
        """Mean and standard error of a metric; None where no cell has it."""
        values = self.values(metric)
        return summarize(list(values.values())) if values else None


def rows_over_seeds(results: Iterable[Mapping[str, Any]]) -> list[Row]:
    """The finished cells of a results.jsonl, grouped by all axes but `seed`, in order of first appearance."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for cell in results:
        if cell["status"] == DONE:
            groups.setdefault(label(_without_seed(cell["axes"])), []).append(cell)
    return [Row(_without_seed(cells[0]["axes"]), tuple(cells)) for cells in groups.values()]


def _without_seed(axes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in axes.items() if name != SEED}


def axis_names(rows: Sequence[Row]) -> list[str]:
    """The axes of the rows, in order of first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row.axes))


def chosen_metrics(rows: Sequence[Row], patterns: Sequence[str] | None) -> list[str]:
    """The metrics to show: those that fit a pattern, in the patterns' order; None: all but standard errors.

    Raises:
        ConfigError: a pattern fits none, naming the nearest.
    """
    known = list(dict.fromkeys(name for row in rows for cell in row.cells for name in cell["metrics"]))
    if patterns is None:
        return [name for name in known if not fnmatchcase(name, _STANDARD_ERRORS)]
    found: list[str] = []
    for pattern in patterns:
        fitting = [name for name in known if fnmatchcase(name, pattern)]
        if known and not fitting:
            raise ConfigError(
                f"metrics: {pattern!r} fits none of the results{did_you_mean(pattern, known)}; there are {', '.join(known)}"
            )
        found += [name for name in fitting if name not in found]
    return found


def baseline_row(rows: Sequence[Row], baseline: Mapping[str, Any] | None) -> Row | None:
    """The one row whose axes have the baseline's values; None without a baseline or without finished cells.

    Raises:
        ConfigError: no row, or more than one, has them.
    """
    if not baseline or not rows:
        return None
    found = [row for row in rows if all(row.axes.get(axis, _ABSENT) == value for axis, value in baseline.items())]
    if len(found) != 1:
        names = "; ".join(row.name for row in (found or rows))
        count = "no row has" if not found else f"{len(found)} rows have"
        raise ConfigError(f"baseline: {count} {label(baseline)}; name one row by its axes: {names}")
    return found[0]


_ABSENT = object()


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


def markdown_table(header: Sequence[str], lines: Iterable[Sequence[str]], *, num_text: int) -> str:
    """A Markdown table; the first `num_text` columns are set left, the others right."""
    rules = [":--" if index < num_text else "--:" for index in range(len(header))]
    cells = [header, rules, *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in cells) + "\n"


def summary_table(rows: Sequence[Row], metrics: Sequence[str]) -> str:
    """Mean ± standard error of every metric in every row, as Markdown; `-` where there is none."""
    axes, names = axis_names(rows), short_names(metrics)
    lines = [
        [*_axis_cells(row, axes), str(len(row.cells)), *(mean_text(row.summary(metric)) for metric in metrics)]
        for row in rows
    ]
    return markdown_table([*axes, "n", *(names[metric] for metric in metrics)], lines, num_text=len(axes))


def difference_table(rows: Sequence[Row], metrics: Sequence[str], baseline: Row) -> str:
    """Every row's difference to the baseline, in the metric's unit and in standard errors, as Markdown."""
    axes, names = axis_names(rows), short_names(metrics)
    lines = [
        [*_axis_cells(row, axes), *(difference_text(row_difference(row, baseline, metric)) for metric in metrics)]
        for row in rows
        if row is not baseline
    ]
    return markdown_table([*axes, *(names[metric] for metric in metrics)], lines, num_text=len(axes))


def _axis_cells(row: Row, axes: Sequence[str]) -> list[str]:
    return [shown_value(row.axes[axis]) if axis in row.axes else "-" for axis in axes]


def mean_text(summary: Summary | None) -> str:
    """`0.4512 ± 0.0021`; `0.4512 ± -` for one value, `-` for none."""
    if summary is None:
        return "-"
    error = "-" if summary.standard_error is None else f"{summary.standard_error:.4f}"
    return f"{summary.mean:.4f} ± {error}"


def difference_text(found: Difference | None) -> str:
    """`+0.0120 (+2.4 p)`: the difference, in standard errors, p for paired by seed and t for two samples."""
    if found is None:
        return "-"
    ratio = "-" if found.in_standard_errors is None else f"{found.in_standard_errors:+.1f}"
    return f"{found.value:+.4f} ({ratio} {'p' if found.kind == 'paired' else 't'})"


def csv_table(rows: Sequence[Row], metrics: Sequence[str], baseline: Row | None) -> str:
    """The rows as CSV, numbers unrounded, an empty field where there is none.

    Columns: the axes, n, and for each metric M: M, M:standard_error, M:n and, with a baseline, M:difference,
    M:difference_in_standard_errors and M:comparison (paired or two-sample).
    """
    axes = axis_names(rows)
    lines = []
    for row in rows:
        line: dict[str, Any] = {axis: shown_value(row.axes[axis]) if axis in row.axes else None for axis in axes}
        line["n"] = len(row.cells)
        for metric in metrics:
            summary, found = row.summary(metric), row_difference(row, baseline, metric)
            line[metric] = summary and summary.mean
            line[f"{metric}:standard_error"] = summary and summary.standard_error
            line[f"{metric}:n"] = summary and summary.n
            if baseline is not None:
                line[f"{metric}:difference"] = found and found.value
                line[f"{metric}:difference_in_standard_errors"] = found and found.in_standard_errors
                line[f"{metric}:comparison"] = found and found.kind
        lines.append(line)
    return _csv_text(lines)


def csv_cells(results: Iterable[Mapping[str, Any]]) -> str:
    """Every cell of a results.jsonl as a CSV line: status, axes, metrics, seconds of each step."""
    lines = [
        {
            "status": cell["status"],
            **{axis: shown_value(value) for axis, value in cell["axes"].items()},
            **cell["metrics"],
            **{f"{step}.seconds": value for step, value in cell["seconds"].items()},
        }
        for cell in results
    ]
    return _csv_text(lines)


def _csv_text(lines: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for line in lines for key in line)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()
