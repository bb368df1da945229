"""The HTML page of a sweep: one file with its data, styles and script inside, which loads nothing else."""

import html
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from kdtune.escape import printable
from kdtune.reports.baseline import Baseline
from kdtune.reports.curves import Curve, Panel
from kdtune.reports.rows import Row, axis_names
from kdtune.reports.tables import difference_text, mean_text, number_text, short_names
from kdtune.sweeps.plan import shown_value
from kdtune.sweeps.results import DONE


def page(
    title: str,
    facts: Sequence[tuple[str, str]],
    notes: Sequence[str],
    rows: Sequence[Row],
    results: Sequence[Mapping[str, Any]],
    metrics: Sequence[str],
    baseline: Baseline | None,
    curves: Sequence[Curve],
    panels: Sequence[Panel],
    numbers: Sequence[tuple[str, str]] = (),
) -> str:
    """Return the page as HTML text: what was run, numbers, tables of rows and of cells, curves in their panels, failed cells."""
    names = short_names(metrics)
    data = {
        "rows": [row.name for row in rows],
        "curves": [_curve_data(curve) for curve in curves],
        "panels": [vars(panel) | {"rows": list(panel.rows)} for panel in panels],
        "summary": _summary_data(rows if metrics else [], metrics, names, baseline),
        "cells": _cells_data(results, metrics, names),
    }
    parts = {
        "TITLE": quoted(title),
        "NOTES": "\n".join(f"<p>{quoted(note)}</p>" for note in notes),
        "FACTS": _facts_html("What was run", facts) + _facts_html("Newest numbers", numbers),
        "FAILED": _failed_html(results),
        "STYLE": _part("report.css"),
        "DATA": embedded_json(data),
        "SCRIPT": _part("report.js"),
    }
    return filled("report.html", parts)


def filled(template: str, parts: Mapping[str, str]) -> str:
    """Return a template of this folder with parts in place of their @@NAME@@."""
    head, *rest = _part(template).split("@@")
    # Every second piece is a name; what is put in is never searched again.
    return head + "".join(parts[piece] if index % 2 == 0 else piece for index, piece in enumerate(rest))


def quoted(text: str) -> str:
    """Escape the text for HTML."""
    return html.escape(printable(text))


def _part(name: str) -> str:
    return files("kdtune.reports").joinpath(name).read_text(encoding="utf-8")


def embedded_json(data: Any) -> str:
    """Return JSON that may stand inside a <script> element: no text in it can end the element or begin a comment."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _curve_data(curve: Curve) -> dict[str, Any]:
    return {
        "row": curve.row,
        "seed": None if curve.seed is None else shown_value(curve.seed),
        "metric": curve.metric,
        "steps": curve.steps,
        "values": [float(f"{value:.6g}") for value in curve.values],
        "bin": curve.bin_size,
    }


def _summary_data(
    rows: Sequence[Row], metrics: Sequence[str], names: Mapping[str, str], baseline: Baseline | None
) -> dict[str, Any]:
    """Return header and lines of the table over seeds; a cell is [text, sort key, detail, class]."""
    axes = axis_names(rows)
    lines = []
    for row in rows:
        line: list[Any] = [_axis_cell(row.axes, axis) for axis in axes]
        line.append([str(len(row.cells)), len(row.cells), "", ""])
        for metric in metrics:
            summary, found = row.summary(metric), baseline and baseline.difference(row, metric)
            strong = "strong" if found and found.is_beyond_bound else ""
            detail = difference_text(found) if found else ("baseline" if baseline and row in baseline.rows else "")
            line.append([mean_text(row, metric), summary and summary.mean, detail, strong])
        lines.append(line)
    return {"header": [*axes, "n", *(names[metric] for metric in metrics)], "num_text": len(axes), "lines": lines}


def _cells_data(
    results: Sequence[Mapping[str, Any]], metrics: Sequence[str], names: Mapping[str, str]
) -> dict[str, Any]:
    axes = list(dict.fromkeys(axis for cell in results for axis in cell["axes"]))
    lines = []
    for cell in results:
        seconds = sum(cell["seconds"].values())
        lines.append(
            [
                *(_axis_cell(cell["axes"], axis) for axis in axes),
                [cell["status"], cell["status"], "", "" if cell["status"] == DONE else "bad"],
                *(_metric_cell(cell["metrics"], metric) for metric in metrics),
                [f"{seconds:.0f}", seconds, "", ""],
            ]
        )
    header = [*axes, "status", *(names[metric] for metric in metrics), "seconds"]
    return {"header": header, "num_text": len(axes) + 1, "lines": lines}


def _metric_cell(values: Mapping[str, float | None], metric: str) -> list[Any]:
    value = values.get(metric)
    if value is None:
        return ["not finite" if metric in values else "-", None, "", ""]
    return [number_text(value), value, "", ""]


def _axis_cell(values: Mapping[str, Any], axis: str) -> list[Any]:
    if axis not in values:
        return ["-", None, "", ""]
    value = values[axis]
    return [shown_value(value), value, "", ""]


def _facts_html(heading: str, facts: Sequence[tuple[str, str]]) -> str:
    lines = [f"<tr><th scope=row>{quoted(name)}</th><td>{quoted(text)}</td></tr>" for name, text in facts]
    return "\n".join([f"<h2>{heading}</h2>", '<table class="facts">', *lines, "</table>\n"]) if lines else ""


def _failed_html(results: Sequence[Mapping[str, Any]]) -> str:
    failed = [cell for cell in results if cell["status"] != DONE]
    blocks = [
        f"<details><summary>{quoted(cell['cell'])}: step {quoted(cell['failed_step'])} failed</summary>"
        f"<pre>{quoted(cell['error'])}</pre></details>"
        for cell in failed
    ]
    return "\n".join(["<h2>Failed cells</h2>", *blocks]) if failed else ""
