"""loss.png, the run's three losses side by side, and the plot that compares runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdtune.errors import DataError
from kdtune.paths import user_path
from kdtune.runs.metrics_file import read_metrics

# (metric, title, what its axis measures); a validation point has the same name with VALIDATION_PREFIX.
_PANELS = (
    ("kd_loss", "KD loss ({divergence} to the teacher)", "{divergence}"),
    ("class_loss", "Class loss (cross entropy)", "cross entropy"),
    ("loss", "Total loss", "loss"),
)
# Of a run that learns from text which a model writes (kdtune.rollouts), beside the losses.
_OF_ROLLOUTS = (
    ("rollout_entropy", "Entropy of the written text", "-log q"),
    ("rollout_tokens", "Length of the written text", "tokens"),
)
_COMPARED = (
    ("val_kd_loss", "Held-out {divergence} to the teacher", "{divergence}"),
    ("val_class_loss", "Held-out cross entropy", "cross entropy"),
)
VALIDATION_PREFIX = "val_"
_UNITS = {
    "val_agreement": "share of tokens",
    "rollout_tokens": "per answer",
    "rollout_cut_share": "share of texts",
    "rollout_repetition": "share of 4 tokens in a row",
    "rollout_overlap": "share of ids",
    "rollout_staleness": "optimizer steps",
    "generated_tokens": "per step",
    "num_valid_tokens": "per step",
}

# From dense to sparse: of curves that coincide the sparser one is drawn on top, the first and solid one is the widest. Their number
# and that of the markers have no divisor in common, so that 35 curves differ.
_DASHES: tuple[Any, ...] = ("-", (0, (10, 2)), (0, (7, 2, 1.5, 2)), (0, (4, 3)), (0, (1.2, 2)))
_MARKERS = ("o", "s", "^", "D", "v", "X", "P")


def plot_losses(metrics_file: str | Path, png: str | Path, *, divergence: str = "KL") -> Path:
    """Draw KD, class and total loss over the steps of a metrics.jsonl, with the validation points, and return the file.

    Entropy and length of the text that a model has written are drawn too, where there is some.

    `metrics_file` is a run's, `png` the file to write, `divergence` the display name of `kd_loss`.

    Raises:
        DataError: the file holds none of the three losses.
    """
    rows = read_metrics(metrics_file)
    panels = [panel for panel in _PANELS if any(panel[0] in row for row in rows)]
    if not panels:
        raise DataError(
            f"{metrics_file}: no losses to plot; rows with {', '.join(panel[0] for panel in _PANELS)} are needed"
        )
    panels += [panel for panel in _OF_ROLLOUTS if any(panel[0] in row for row in rows)]
    figure, all_axes = _figure(panels, divergence)
    for axes, (name, *_) in zip(all_axes, panels, strict=True):
        _draw(axes, rows, name)
        axes.legend()
    target = user_path(png)
    figure.savefig(target, dpi=150)
    return target


def plot_runs(runs: Mapping[str, Sequence[Mapping[str, Any]]], png: str | Path, *, divergence: str = "KL") -> Path:
    """Draw the held-out losses of several runs over the steps, a curve each, with the teacher's, and return the file.

    `runs` are the metrics by name in the legend. `png` may have any suffix that matplotlib writes. `divergence` is the
    display name of `val_kd_loss`.
    """
    from matplotlib import style

    # Told apart with the common forms of colour blindness too.
    colors = [look["color"] for look in style.library["tableau-colorblind10"]["axes.prop_cycle"]]
    panels = [
        panel for panel in _COMPARED if any(row.get(panel[0]) is not None for rows in runs.values() for row in rows)
    ]
    figure, all_axes = _figure(panels, divergence)
    for axes, (name, *_) in zip(all_axes, panels, strict=True):
        for index, (run, rows) in enumerate(runs.items()):
            steps, values = _series(rows, name)
            if values:
                axes.plot(steps, values, label=run, **curve_look(index, len(values), colors))
        teachers = {} if name != "val_class_loss" else dict.fromkeys(
            value for rows in runs.values() for value in _series(rows, "val_teacher_class_loss")[1]
        )  # fmt: skip
        for value in teachers:
            axes.axhline(value, color="black", linestyle="--", linewidth=1, label="teacher")
        if name == "val_kd_loss":
            axes.set_ylim(bottom=0)  # the teacher's own
        axes.legend()
    target = user_path(png)
    figure.savefig(target, dpi=150)
    return target


def curve_look(place: int, num_points: int, colors: Sequence[str]) -> dict[str, Any]:
    """Return settings of matplotlib's `plot` for one of several curves, so that coinciding curves can all be seen.

    Args:
        place: the curve's place in the legend; it decides colour, dashes and marker.
        num_points: number of points. Few points all have markers; many have about eight, at other steps than the next curve.
        colors: the colours to choose from.
    """
    dash, marker = place % len(_DASHES), place % len(_MARKERS)
    every = -(-num_points // 8) if num_points > 16 else 1
    return {
        "color": colors[place % len(colors)],
        "linestyle": _DASHES[dash],
        "linewidth": 1.2 if dash else 2.0,
        "marker": _MARKERS[marker],
        "markersize": 4,
        "markerfacecolor": "none",
        "markevery": (marker * every // len(_MARKERS), every),
        "zorder": 2 + 0.1 * dash,
    }


def _figure(panels: Sequence[tuple[str, str, str]], divergence: str) -> tuple[Any, Sequence[Any]]:
    """Make a figure with its panels, each with a title and the unit of its axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width = 5.0 * len(panels)
    figure = Figure(figsize=(width, 3.8))
    # Fixed margins: a layout found by drawing takes longer than the drawing.
    figure.subplots_adjust(left=0.7 / width, right=1 - 0.15 / width, bottom=0.14, top=0.9, wspace=0.2)
    FigureCanvasAgg(figure)  # no pyplot: no global state, no window system
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (name, title, measured) in zip(all_axes, panels, strict=True):
        axes.set_title(title.format(divergence=divergence))
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(f"{measured.format(divergence=divergence)}, {unit_of(name, divergence)}")
        axes.grid(alpha=0.3)
    return figure, all_axes


def unit_of(metric: str, divergence: str) -> str:
    """Return the unit of a metric of metrics.jsonl: nats per token, or per token where a divergence other than the KL is in it.

    `divergence` is the display name of `kd_loss`.
    """
    if metric in _UNITS:
        return _UNITS[metric]
    in_nats = ("class_loss", "rollout_entropy", "rollout_log_ratio")
    is_in_nats = metric.removeprefix(VALIDATION_PREFIX) in in_nats or divergence == "KL"
    return "nats per token" if is_in_nats else "per token"


def _draw(axes: Any, rows: list[dict[str, Any]], name: str) -> None:
    """Draw one metric's curves: every step in a pale line, its running mean, and the validation points."""
    steps, values = _series(rows, name)
    window = max(1, len(values) // 20)
    if window == 1:
        axes.plot(steps, values, color="tab:blue", marker="o" if len(values) == 1 else None, label="training")
    else:
        axes.plot(steps, values, color="tab:blue", alpha=0.3, linewidth=0.8, label="training")
        axes.plot(steps, running_mean(values, window), color="tab:blue", label=f"training, mean of {window} steps")
    val_steps, val_values = _series(rows, VALIDATION_PREFIX + name)
    if val_steps:
        axes.plot(val_steps, val_values, color="tab:orange", marker="o", markersize=4, label="validation")


def _series(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    found = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Return the mean of each value and the up to `window` - 1 before it."""
    spans = [values[max(0, end - window) : end] for end in range(1, len(values) + 1)]
    return [sum(span) / len(span) for span in spans]
