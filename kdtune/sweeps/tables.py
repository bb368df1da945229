"""Rows over seeds as Markdown and CSV, and which metrics they show."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from kdtune._assets import did_you_mean
from kdtune.escape import csv_value, markdown_table, markdown_text
from kdtune.sweeps.baseline import Baseline
from kdtune.sweeps.plan import shown_value
from kdtune.sweeps.rows import STANDARD_ERROR, Row, axis_names
from kdtune.sweeps.statistics import Difference


def known_metrics(rows: Sequence[Row]) -> list[str]:
    """Every metric that a cell of the rows has, in order of first appearance."""
    return list(dict.fromkeys(name for row in rows for cell in row.cells for name in cell["metrics"]))


def chosen_metrics(rows: Sequence[Row], patterns: Sequence[str] | None) -> list[str]:
    """The metrics to show: those that fit a pattern, in the patterns' order.

    Where there are no patterns (None), or none that fits, they are all but standard errors.
    """
    known = known_metrics(rows)
    found = [name for pattern in patterns or () for name in known if fnmatchcase(name, pattern)]
    shown = [name for name in known if not name.partition(",")[0].endswith(STANDARD_ERROR)]
    return list(dict.fromkeys(found)) or ([] if patterns == [] else shown)


def metric_problems(rows: Sequence[Row], patterns: Sequence[str] | None) -> list[str]:
    """The patterns that fit no metric, a sentence each that names the nearest; [] while no cell has any."""
    known = known_metrics(rows)
    return [
        f"metrics: {pattern!r} fits none of the results{did_you_mean(pattern, known)}; there are {', '.join(known)}"
        for pattern in patterns or ()
        if known and not any(fnmatchcase(name, pattern) for name in known)
    ]


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


def difference_table(rows: Sequence[Row], metrics: Sequence[str], baseline: Baseline) -> str:
    """Every row's difference to what it is compared with as Markdown (see `difference_text`), bold beyond the bound of Student's t."""
    axes, names = axis_names(rows), short_names(metrics)
    lines = [
        [*_axis_cells(row, axes), *(_emphasized(baseline.difference(row, metric)) for metric in metrics)]
        for row in rows
        if row not in baseline.rows
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


def csv_table(rows: Sequence[Row], metrics: Sequence[str], baseline: Baseline | None) -> str:
    """The rows as CSV, numbers unrounded, an empty field where there is none.

    Columns: the axes, n (cells), and for each metric M: M, M:standard_error (over seeds), M:n (finite values; 0 where all
    were not finite), M:document_error where a row of one seed has the task's own. With a baseline also `baseline` (the
    name of the row that this one is compared with), M:difference, M:difference_in_standard_errors, M:bound (of that,
    Student's t, 5 %) and M:comparison (paired or two-sample).
    """
    axes = axis_names(rows)
    with_documents = [metric for metric in metrics if any(row.document_error(metric) is not None for row in rows)]
    lines = []
    for row in rows:
        line: dict[str, Any] = {
            _axis_column(axis, ("n", "baseline")): shown_value(row.axes[axis]) if axis in row.axes else None
            for axis in axes
        }
        line["n"] = len(row.cells)
        if baseline is not None:
            other = baseline.counterpart(row)
            line["baseline"] = other and other.name
        for metric in metrics:
            summary, found = row.summary(metric), baseline and baseline.difference(row, metric)
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
            **{_axis_column(axis, ("status",)): shown_value(value) for axis, value in cell["axes"].items()},
            **cell["metrics"],
            **{f"{step}.seconds": value for step, value in cell["seconds"].items()},
        }
        for cell in results
    ]
    return _csv_text(lines)


def _axis_column(axis: str, taken: Sequence[str]) -> str:
    """The column of an axis, which must not be one that the table has of its own."""
    return f"axis:{axis}" if axis in taken else axis


def _csv_text(lines: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    columns = list(dict.fromkeys(key for line in lines for key in line))
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(csv_value, columns))
    writer.writerows([csv_value(line.get(column)) for column in columns] for line in lines)
    return text.getvalue()
