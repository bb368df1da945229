"""Plots of a sweep's losses: one for all rows, and one for each axis with the rows that differ only in it."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdtune.escape import one_line
from kdtune.reports.curves import LOSSES, TRAINING, CellRun, Curve, Panel, comparable_panels
from kdtune.reports.rows import Row, axis_names
from kdtune.reports.statistics import summarize
from kdtune.runs.plot import curve_look, running_mean
from kdtune.sweeps.plan import label, shown_value

# Told apart with the common forms of colour blindness too. Dashes and marker change with them.
COLORS = ("#2563eb", "#d9480f", "#0a8f6c", "#b8408f", "#8a6d00", "#6b4fd8", "#17849c", "#c02a3c")

# What LaTeX takes and what a page or a slide takes, beside the PNG.
SUFFIXES = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Plot:
    """A plot, in three files that differ in their suffix: `files[0]` is the PNG. The caption is plain text."""

    files: tuple[Path, ...]
    caption: str


def plot_sweep(rows: Sequence[Row], runs: Sequence[CellRun], curves: Sequence[Curve], folder: Path) -> list[Plot]:
    """Draw `losses` and `losses_by_AXIS` into a folder; none without curves."""
    drawn = sorted({curve.row for curve in curves})
    if not drawn:
        return []
    names = {index: rows[index].name for index in drawn}
    plots = [_plot(rows, runs, curves, drawn, folder / "losses", names, "all rows")]
    for axis in axis_names(rows):
        family = one_axis_family(rows, drawn, axis)
        if 1 < len(family) < len(drawn):
            names = {index: f"{axis}={shown_value(rows[index].axes[axis])}" for index in family}
            others = label({name: value for name, value in rows[family[0]].axes.items() if name != axis})
            what = f"rows that differ in {axis} alone" + (f", with {others}" if others else "")
            stem = re.sub(r"\W", "_", f"losses_by_{axis}")
            plots.append(_plot(rows, runs, curves, family, folder / stem, names, what))
    return plots


def one_axis_family(rows: Sequence[Row], candidates: Sequence[int], axis: str) -> list[int]:
    """Return the largest set of rows that differ in only one axis, by index; the first of several of that size."""
    families: dict[str, list[int]] = {}
    for index in candidates:
        if axis in rows[index].axes:
            others = {name: value for name, value in rows[index].axes.items() if name != axis}
            families.setdefault(repr(others), []).append(index)
    return max(families.values(), key=len, default=[])


def mean_and_band(curves: Sequence[Curve], window: int) -> tuple[list[float], list[float], list[float]]:
    """Return steps, mean over the seeds and its standard error (0 for one seed), of running means over `window` points.

    Steps that not every seed has are omitted.
    """
    smooth = [dict(zip(curve.steps, running_mean(curve.values, window), strict=True)) for curve in curves]
    steps = [step for step in curves[0].steps if all(step in one for one in smooth)]
    summaries = [summarize([one[step] for one in smooth]) for step in steps]
    return steps, [found.mean for found in summaries], [found.standard_error or 0.0 for found in summaries]


def _plot(
    rows: Sequence[Row],
    runs: Sequence[CellRun],
    curves: Sequence[Curve],
    family: Sequence[int],
    stem: Path,
    names: Mapping[int, str],
    what: str,
) -> Plot:
    """Draw one figure of a page's width: a panel for each metric and group of comparable rows, the legend below."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    panels = comparable_panels(runs, family, LOSSES)
    panels = [panel for panel in panels if any(_curves_of(curves, panel, index) for index in panel.rows)]
    lines = [group[start : start + 3]
             for group in ([panel for panel in panels if (panel.metric in TRAINING) is training] for training in (True, False))
             for start in range(0, len(group), 3)]  # fmt: skip
    num_columns = max(map(len, lines))
    places = {index: place for place, index in enumerate(family)}
    window = max(1, max(len(curve.values) for curve in curves) // 20)
    # Letters as letters, and the same file for the same numbers.
    with matplotlib.rc_context({"font.size": 8, "svg.fonttype": "none", "svg.hashsalt": "kdtune", "pdf.fonttype": 42}):
        width = 7.5 * num_columns / 3 if num_columns < 3 else 7.5
        # Of 8 points some 15 letters go into an inch; beside a name stands its line.
        longest = max(len(one_line(names[index])) for index in family)
        legend_columns = max(1, min(num_columns, int(15 * width / (longest + 10))))
        height = 2.2 * len(lines) + 0.18 * -(-len(family) // legend_columns) + 0.2
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)  # no pyplot: no global state, no window system
        handles: dict[int, Any] = {}
        grid = figure.subplots(len(lines), num_columns, squeeze=False)
        for axes, panel in itertools.chain(*map(itertools.zip_longest, grid, lines)):
            if panel is None:
                axes.set_axis_off()
                continue
            for index in [index for index in family if index in panel.rows]:
                if own := _curves_of(curves, panel, index):
                    smooth = window if panel.metric in TRAINING else 1
                    handles.setdefault(index, _draw(axes, own, smooth, places[index]))
            axes.set(xlabel="optimizer step", ylabel=panel.unit)
            axes.set_title(panel.title.replace(" (", "\n("), fontsize=8, parse_math=False)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
            axes.grid(alpha=0.3)
        shown = [index for index in family if index in handles]
        legend = figure.legend(
            [handles[index] for index in shown], [one_line(names[index]) for index in shown], loc="outside lower center",
            ncols=legend_columns, frameon=False, handlelength=4,
        )  # fmt: skip
        for text in legend.get_texts():
            text.set_parse_math(False)  # a $ in a value is a dollar
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out once, for all three
        files = tuple(stem.with_name(f"{stem.name}{suffix}") for suffix in SUFFIXES)
        for file in files:
            # The time would make two files of the same numbers differ; a PNG has none.
            stamp = {".svg": "Date", ".pdf": "CreationDate"}.get(file.suffix)
            figure.savefig(file, dpi=200, metadata={stamp: None} if stamp else None)
    return Plot(files, _caption(rows, curves, family, window, panels, what))


def _curves_of(curves: Sequence[Curve], panel: Panel, row: int) -> list[Curve]:
    return [curve for curve in curves if curve.row == row and curve.metric == panel.metric]


def _draw(axes: Any, curves: Sequence[Curve], window: int, place: int) -> Any:
    """Draw a row's mean over its seeds with the band of its standard error; return the line, for the legend."""
    steps, means, errors = mean_and_band(curves, window)
    lower = [mean - error for mean, error in zip(means, errors, strict=True)]
    upper = [mean + error for mean, error in zip(means, errors, strict=True)]
    look = curve_look(place, len(steps), COLORS)
    axes.fill_between(steps, lower, upper, color=look["color"], alpha=0.15, linewidth=0)
    return axes.plot(steps, means, **look)[0]


def _caption(
    rows: Sequence[Row], curves: Sequence[Curve], family: Sequence[int], window: int, panels: Sequence[Panel], what: str
) -> str:
    """Return the caption of a plot: content, number of seeds, band, smoothing, and omissions."""
    counts = sorted({len(rows[index].cells) for index in family})
    n = f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]}"
    parts = [f"Losses over the optimizer steps, {what}"]
    parts.append(
        f"lines are means over {n} seeds, bands ± one standard error (s / √n)"
        if counts[-1] > 1
        else "one seed each (n = 1)"
    )
    bin_size = max(curve.bin_size for curve in curves)
    if window * bin_size > 1:
        parts.append(
            f"training curves are running means of {window * bin_size} logged steps, held-out values as measured"
        )
    metrics = {panel.metric for panel in panels}
    if {"kd_loss", "class_loss"} <= metrics and "loss" not in metrics:
        parts.append("the total loss, a mix of the two by kd_ratio, is not drawn")
    return f"{'; '.join(parts)}."
