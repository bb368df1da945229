"""PNG plots of a sweep's losses: one for all rows, and one for each axis with the rows that differ in it alone."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdtune.escape import one_line
from kdtune.sweeps.curves import TRAINING, Curve, running_mean
from kdtune.sweeps.plan import shown_value
from kdtune.sweeps.statistics import summarize
from kdtune.sweeps.tables import Row, axis_names

# Told apart with the common forms of colour blindness too; after them the line style changes.
COLORS = ("#2563eb", "#d9480f", "#0a8f6c", "#b8408f", "#8a6d00", "#6b4fd8", "#17849c", "#c02a3c")
_STYLES = ("-", "--", ":", "-.")


def plot_sweep(rows: Sequence[Row], curves: Sequence[Curve], folder: Path) -> list[Path]:
    """Draws losses.png and losses_by_AXIS.png into a folder and returns the files; none without curves."""
    drawn = sorted({curve.row for curve in curves if curve.metric in dict(TRAINING)})
    if not drawn:
        return []
    files = [_plot(rows, curves, drawn, folder / "losses.png", {index: rows[index].name for index in drawn})]
    for axis in axis_names(rows):
        family = one_axis_family(rows, drawn, axis)
        if 1 < len(family) < len(drawn):
            names = {index: f"{axis}={shown_value(rows[index].axes[axis])}" for index in family}
            file_name = re.sub(r"\W", "_", f"losses_by_{axis}")
            files.append(_plot(rows, curves, family, folder / f"{file_name}.png", names))
    return files


def one_axis_family(rows: Sequence[Row], candidates: Sequence[int], axis: str) -> list[int]:
    """The largest set of rows that differ in one axis alone, by index; the first of several of that size."""
    families: dict[str, list[int]] = {}
    for index in candidates:
        if axis in rows[index].axes:
            others = {name: value for name, value in rows[index].axes.items() if name != axis}
            families.setdefault(repr(others), []).append(index)
    return max(families.values(), key=len, default=[])


def mean_and_band(curves: Sequence[Curve], window: int) -> tuple[list[float], list[float], list[float]]:
    """Steps, mean over the seeds and its standard error (0 for one seed), of running means over `window` points.

    Steps that not every seed has are left out.
    """
    smooth = [dict(zip(curve.steps, running_mean(curve.values, window), strict=True)) for curve in curves]
    steps = [step for step in curves[0].steps if all(step in one for one in smooth)]
    summaries = [summarize([one[step] for one in smooth]) for step in steps]
    return steps, [found.mean for found in summaries], [found.standard_error or 0.0 for found in summaries]


def _plot(
    rows: Sequence[Row], curves: Sequence[Curve], family: Sequence[int], png: Path, names: dict[int, str]
) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.2 + 0.22 * -(-len(family) // 3)), layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: no global state, no window system
    longest = max(len(curve.values) for curve in curves)
    window = max(1, longest // 20)
    handles: dict[int, Any] = {}
    for axes, (metric, title) in zip(figure.subplots(1, len(TRAINING)), TRAINING, strict=True):
        for place, index in enumerate(family):
            own = [curve for curve in curves if curve.row == index and curve.metric == metric]
            if own:
                style = {
                    "color": COLORS[place % len(COLORS)],
                    "linestyle": _STYLES[place // len(COLORS) % len(_STYLES)],
                }
                steps, means, errors = mean_and_band(own, window)
                lower = [mean - error for mean, error in zip(means, errors, strict=True)]
                upper = [mean + error for mean, error in zip(means, errors, strict=True)]
                handles.setdefault(index, axes.plot(steps, means, linewidth=1.6, **style)[0])
                axes.fill_between(steps, lower, upper, color=style["color"], alpha=0.15, linewidth=0)
        axes.set(title=title, xlabel="optimizer step", ylabel="nats per token")
        axes.grid(alpha=0.3)
    shown = [index for index in family if index in handles]
    legend = figure.legend(
        [handles[index] for index in shown], [one_line(names[index]) for index in shown], loc="outside lower center",
        ncols=3, frameon=False, fontsize=9,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)  # a $ in a value is a dollar
    figure.suptitle(_caption(rows, curves, family, window), fontsize=10)
    figure.savefig(png, dpi=120)
    return png


def _caption(rows: Sequence[Row], curves: Sequence[Curve], family: Sequence[int], window: int) -> str:
    most = max(len(rows[index].cells) for index in family)
    parts = [f"mean over seeds, band: ± standard error (n up to {most})" if most > 1 else "one seed each"]
    bin_size = max(curve.bin_size for curve in curves)
    if window * bin_size > 1:
        parts.append(f"running mean of {window * bin_size} logged steps")
    return "; ".join(parts)
