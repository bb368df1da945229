"""Tables of rows over seeds, as Markdown and CSV, and the choice of metrics in them."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from kdtune._assets import did_you_mean
from kdtune.escape import csv_value, markdown_table, markdown_text
from kdtune.reports.baseline import Baseline
from kdtune.reports.rows import STANDARD_ERROR, Row, axis_names
from kdtune.reports.statistics import Difference
from kdtune.sweeps.plan import shown_value


def known_metrics(rows: Sequence[Row]) -> list[str]:
    """Return every metric that a cell of the rows has, in order of first appearance."""
    return list(dict.fromkeys(name for row in rows for cell in row.cells for name in cell["metrics"]))


def chosen_metrics(rows: Sequence[Row], patterns: Sequence[str] | None) -> list[str]:
    """Return the metrics to show: those that match a pattern, in the patterns' order.

    Without patterns (None), or if none matches, return all but standard errors and, where kd_ratio differs between rows, the
    total loss: a mix of cross entropy and divergence that differs with kd_ratio by its weights alone.
    """
    known = known_metrics(rows)
    found = [name for pattern in patterns or () for name in known if fnmatchcase(name, pattern)]
    is_mixed = len({repr(row.axes[axis]) for row in rows for axis in row.axes if axis.endswith("kd_ratio")}) > 1
    mixes = {
        name for name in known if is_mixed and name.endswith(".loss") and name.replace(".loss", ".class_loss") in known
    }
    shown = [name for name in known if not name.partition(",")[0].endswith(STANDARD_ERROR) and name not in mixes]
    return list(dict.fromkeys(found)) or ([] if patterns == [] else shown)


def metric_problems(rows: Sequence[Row], patterns: Sequence[str] | None) -> list[str]:
    """Return a sentence for each pattern that matches no metric, naming the nearest; [] while no cell has any."""
    known = known_metrics(rows)
    return [
        f"metrics: {pattern!r} fits none of the results{did_you_mean(pattern, known)}; there are {', '.join(known)}"
        for pattern in patterns or ()
        if known and not any(fnmatchcase(name, pattern) for name in known)
    ]


def short_names(metrics: Sequence[str]) -> dict[str, str]:
    """Return the metrics' names without their step if that leaves them distinct."""
    bare = {metric: metric.partition(".")[2] or metric for metric in metrics}
    return {metric: name if list(bare.values()).count(name) == 1 else metric for metric, name in bare.items()}


def summary_table(rows: Sequence[Row], metrics: Sequence[str]) -> str:
    """Return mean ± standard error of every metric in every row, as Markdown (see `mean_text`)."""
    axes, names = axis_names(rows), short_names(metrics)
    lines = [
        [*_axis_cells(row, axes), str(len(row.cells)), *(mean_text(row, metric) for metric in metrics)] for row in rows
    ]
    return markdown_table([*axes, "n", *(names[metric] for metric in metrics)], lines, num_text=len(axes))


def difference_table(rows: Sequence[Row], metrics: Sequence[str], baseline: Baseline) -> str:
    """Return every row's difference to its counterpart as Markdown (see `difference_text`), bold beyond Student's t bound."""
    axes, names = axis_names(rows), short_names(metrics)
    lines = [
        [*_axis_cells(row, axes), *(_emphasized(baseline.difference(row, metric)) for metric in metrics)]
        for row in rows
        if row not in baseline.rows
    ]
    return markdown_table([*axes, *(names[metric] for metric in metrics)], lines, num_text=len(axes))


def _axis_cells(row: Row, axes: Sequence[str]) -> list[str]:
    return [markdown_text(shown_value(row.axes[axis])) if axis in row.axes else "-" for axis in axes]


def number_text(value: float, sign: str = "") -> str:
    """Format a number with four decimals, from a million on with four digits, `1.126e+13`; with `sign` "+" also a positive one has it."""
    return f"{value:{sign}.4f}" if abs(value) < 1e6 else f"{value:{sign}.4g}"


def mean_text(row: Row, metric: str) -> str:
    """Format a row's mean and its standard error over seeds, `0.4512 ± 0.0021`; `-` for none.

    For one seed: `0.4512 ± 0.0140 d` with the task's own standard error over documents, `0.4512 ± -` without one.
    ` (2 of 3)` follows if not every cell has a finite number.
    """
    summary, (num_finite, num_cells) = row.summary(metric), row.counts(metric)
    text = "-"
    if summary is not None:
        over_documents = row.document_error(metric)
        error = over_documents if summary.standard_error is None else summary.standard_error
        text = f"{number_text(summary.mean)} ± " + ("-" if error is None else number_text(error))
        text += " d" if over_documents is not None else ""
    return text if num_finite == num_cells else f"{text} ({num_finite} of {num_cells})"


def difference_text(found: Difference | None) -> str:
    """Format `+0.0120 (+2.4 p, n 3)`: the difference, the number of standard errors, paired by seed, and the number of seeds.

    For two samples `+0.0120 (+2.4 t, n 3, 2)`; `-` instead of a missing number of standard errors.
    """
    if found is None:
        return "-"
    ratio = "-" if found.in_standard_errors is None else f"{found.in_standard_errors:+.1f}"
    how = f"p, n {found.counts[0]}" if found.kind == "paired" else f"t, n {found.counts[0]}, {found.counts[1]}"
    return f"{number_text(found.value, '+')} ({ratio} {how})"


def _emphasized(found: Difference | None) -> str:
    text = difference_text(found)
    return f"**{text}**" if found is not None and found.is_beyond_bound else text


def csv_table(rows: Sequence[Row], metrics: Sequence[str], baseline: Baseline | None) -> str:
    """Return the rows as CSV, numbers unrounded, with empty fields for missing values.

    Columns: the axes, n (cells), and for each metric M: M, M:standard_error (over seeds), M:n (finite values; 0 if none was
    finite), M:document_error (the task's own, for a row of one seed). With a baseline also `baseline` (the name of the row
    that this one is compared with), M:difference, M:difference_in_standard_errors, M:bound (of that, Student's t, 5 %) and
    M:comparison (paired or two-sample).
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
    """Return every cell of a results.jsonl as a CSV line: status, axes, metrics, seconds of each step."""
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
    """Return the column name of an axis, renamed if it collides with one of the table's own."""
    return f"axis:{axis}" if axis in taken else axis


def _csv_text(lines: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    columns = list(dict.fromkeys(key for line in lines for key in line))
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(csv_value, columns))
    writer.writerows([csv_value(line.get(column)) for column in columns] for line in lines)
    return text.getvalue()
