"""The report of a sweep: report.md, report.csv, cells.csv, report.tex, plots and report.html from a results.jsonl."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kdtune.checkpoint import atomic_write_text
from kdtune.errors import ConfigError
from kdtune.escape import markdown_fence, markdown_table, markdown_text
from kdtune.json_files import read_json_lines
from kdtune.log import get_logger
from kdtune.paths import user_path
from kdtune.reports.baseline import Baseline, find_baseline, planned_rows, row_problems
from kdtune.reports.curves import SERIES, CellRun, Curve, all_curves, comparable_panels, read_training
from kdtune.reports.latex import latex_report
from kdtune.reports.page import page
from kdtune.reports.plots import Plot, plot_sweep
from kdtune.reports.rows import Row, repeated_cells, rows_over_seeds
from kdtune.reports.tables import chosen_metrics, csv_cells, csv_table, difference_table, metric_problems, summary_table
from kdtune.runs import has_facts, read_run, run_facts
from kdtune.sweeps.results import DONE, finite_metrics

log = get_logger(__name__)

# Of a setting in which the runs differ, so many values are listed.
MAX_VALUES = 6

# Of a run's numbers, those that its own page names, the newest of each.
_NEWEST = ("val_", "rollout_", "policy_", "total_flops")
_CELL_KEYS = ("cell", "axes", "status", "metrics", "seconds", "folders")


def read_results(path: str | Path) -> list[dict[str, Any]]:
    """Read the cells of a results.jsonl.

    Raises:
        CheckpointError: the file cannot be read, or has a line that is no JSON object.
        ConfigError: it is empty, or not a sweep's.
    """
    results = read_json_lines(user_path(path))
    if not results:
        raise ConfigError(f"{path}: holds no cell; run the sweep until one is finished")
    for number, row in enumerate(results, start=1):
        missing = [key for key in _CELL_KEYS if key not in row]
        if missing:
            raise ConfigError(f"{path}: line {number} has no {', '.join(missing)}; it is not a sweep's results.jsonl")
    return [row | {"metrics": finite_metrics(row["metrics"])} for row in results]


def write_report(
    results_file: str | Path,
    output_dir: str | Path,
    *,
    title: str,
    metrics: Sequence[str] | None = None,
    baseline: Mapping[str, Any] | None = None,
    planned: Iterable[Mapping[str, Any]] | None = None,
    strict: bool = True,
) -> list[Path]:
    """Write the report and return its files, the Markdown first.

    Args:
        results_file: a sweep's results.jsonl; the curves are read from the folders it names, relative to its own.
        output_dir: folder to write into; files of an earlier report are replaced.
        title: heading of the report.
        metrics: names or patterns of the metrics to show, in order; None: all but standard errors.
        baseline: axis values of the baseline (see `find_baseline`); None: no comparison.
        planned: axis values of all cells of the sweep, finished or not; None: those of the results.
        strict: make it an error if a metric pattern matches nothing or no row can be compared with the baseline; otherwise the
            report is written without them and says so, as does the log. If no pattern matches, all metrics are shown.

    Raises:
        ConfigError: the results cannot be read; with `strict`, a pattern matches nothing or no row can be compared.
        CheckpointError: a file cannot be written.
    """
    results = read_results(results_file)
    rows = rows_over_seeds(results)
    to_come = planned_rows([cell["axes"] for cell in results] if planned is None else planned)
    misfits = [*repeated_cells(results), *metric_problems(rows, metrics), *row_problems(rows, baseline, to_come)]
    if misfits and strict:
        raise ConfigError("\n".join(misfits))
    for misfit in misfits:
        log.warning("report: %s", misfit)
    names = chosen_metrics(rows, metrics)
    base = find_baseline(rows, baseline, to_come)
    runs = read_training(rows, user_path(results_file).parent)
    curves, facts, panels = all_curves(runs), shared_facts(runs), comparable_panels(runs, range(len(rows)), SERIES)
    folder = user_path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    plots = plot_sweep(rows, runs, curves, folder)
    notes = [*report_notes(results, rows, base, curves), *(f"Left out: {misfit}." for misfit in misfits)]
    texts = {
        "report.md": markdown(title, facts, notes, results, rows, names, base, plots),
        "report.csv": csv_table(rows, names, base),
        "cells.csv": csv_cells(results),
        "report.html": page(title, facts, notes, rows, results, names, base, curves, panels),
        "report.tex": latex_report(title, facts, rows, names, base, plots),
    }
    for name, text in texts.items():
        atomic_write_text(folder / name, text)
    return [*(folder / name for name in texts), *(file for plot in plots for file in plot.files)]


def write_run_page(run_dir: str | Path, output_dir: str | Path, *, title: str) -> list[Path]:
    """Write report.html of one training run, also of one that is under way: what was run, its newest numbers, its curves.

    Args:
        run_dir: its folder.
        output_dir: folder to write into; an earlier page is replaced.
        title: heading of the page.

    Raises:
        ConfigError: the folder holds no training run.
        CheckpointError: a file of the run is damaged, or the page cannot be written.
    """
    run = read_run(user_path(run_dir))
    newest = {name: (value, row["step"]) for row in run.rows for name, value in row.items() if name.startswith(_NEWEST)}
    numbers = [(name, f"{value:.4g} (step {step})") for name, (value, step) in newest.items() if value is not None]
    rows = rows_over_seeds([{"axes": {"run": user_path(run_dir).name}, "metrics": {}, "status": DONE}])
    runs = [CellRun(0, None, run)]
    curves, panels = all_curves(runs), comparable_panels(runs, [0], SERIES)
    text = page(title, shared_facts(runs), [], rows, [], [], None, curves, panels, numbers)
    folder = user_path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(folder / "report.html", text)
    return [folder / "report.html"]


def shared_facts(runs: Sequence[CellRun]) -> list[tuple[str, str]]:
    """Return (name, text) pairs that describe the training runs: shared settings, and values where they differ.

    Runs of the user's own recipes, which have other keys, are omitted. A setting that only some runs have (a teacher, a
    kd_ratio) is listed with their number.
    """
    described = [one.run for one in runs if has_facts(one.run.config, one.run.start)]
    found: dict[str, list[str]] = {}
    for run in described:
        date = [("date", str(run.start["started"])[:10])] if run.start.get("started") else []
        for name, text in [*run_facts(run.config, run.start, run.rows), *date]:
            found.setdefault(name, []).append(text)
    return [(name, _either(texts, len(described))) for name, texts in found.items()]


def _either(texts: Sequence[str], num_runs: int) -> str:
    """Join the different values of a setting, with the number of runs that have it where not all do."""
    different = list(dict.fromkeys(texts))
    shown = " | ".join(different)
    if len(different) > MAX_VALUES:
        shown = f"{len(different)} different, such as {different[0]}"
    return shown if len(texts) == num_runs else f"{shown} ({len(texts)} of {num_runs} runs)"


def report_notes(
    results: Sequence[Mapping[str, Any]], rows: Sequence[Row], baseline: Baseline | None, curves: Sequence[Curve]
) -> list[str]:
    """Return notes for the reader of the tables and plots, one paragraph each."""
    done = sum(cell["status"] == DONE for cell in results)
    notes = [
        f"{done} finished cells in {len(rows)} rows, {len(results) - done} failed. A number is the mean over n seeds ± its "
        "standard error s / √n (s with n - 1 degrees of freedom; - where n = 1). An axis that does not matter to a row is -.",
        "This standard error covers the seeds alone, not which documents or examples were measured on: another set of them "
        "would move all rows. Where there is one seed, d marks the task's own standard error over its documents. (2 of 3): so "
        "many values were finite, and the others are not in the mean.",
    ]
    if baseline is not None:
        where = "; - where there is none" if baseline.matched else ""
        notes.append(
            f"Baseline: {baseline.name}{where}. Differences stand beside their size in standard errors of the difference: p paired "
            "by seed, where both rows have the same seeds; t of two samples, √(s₁²/n₁ + s₂²/n₂); - where a row has one seed; n is "
            "the number of seeds. Bold: beyond the two-sided 5 % bound of Student's t for so few (n = 3 paired: 4.3; n = 2: "
            "12.7), each comparison by itself: of twenty without any difference one is bold."
        )
    bin_size = max((curve.bin_size for curve in curves), default=1)
    if bin_size > 1:
        notes.append(f"Long curves are thinned: each point is the mean of up to {bin_size} logged steps.")
    if not curves:
        notes.append("There are no curves: no training folder named in the results was found.")
    return notes


def markdown(
    title: str,
    facts: Sequence[tuple[str, str]],
    notes: Sequence[str],
    results: Sequence[Mapping[str, Any]],
    rows: Sequence[Row],
    metrics: Sequence[str],
    baseline: Baseline | None,
    plots: Sequence[Plot],
) -> str:
    """Return the report as Markdown, with its plots by file name."""
    parts = [f"# {markdown_text(title)}"]
    if facts:
        lines = [[name, markdown_text(text)] for name, text in facts]
        parts += ["## What was run", markdown_table(["", ""], lines, num_text=2)]
    parts += ["## How to read it", *map(markdown_text, notes)]
    if rows:
        parts += ["## Results", summary_table(rows, metrics)]
    if baseline is not None and len(rows) > 1:
        parts += ["## Difference to the baseline", difference_table(rows, metrics, baseline)]
    for plot in plots:
        parts += [f"![{plot.files[0].stem}]({plot.files[0].name})", markdown_text(plot.caption)]
    failed = [cell for cell in results if cell["status"] != DONE]
    if failed:
        parts.append("## Failed cells")
        parts += [
            f"**{markdown_text(cell['cell'])}**: step {markdown_text(cell['failed_step'])} failed.\n\n{markdown_fence(cell['error'])}"
            for cell in failed
        ]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"
