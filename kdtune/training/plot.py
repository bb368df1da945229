"""loss.png: the run's three losses side by side."""

from pathlib import Path
from typing import Any

from kdtune.errors import DataError
from kdtune.training.loggers import read_metrics

# (metric, title); a validation point has the same name with this prefix.
_PANELS = (
    ("kd_loss", "KD loss (divergence from the teacher)"),
    ("class_loss", "Class loss (cross entropy)"),
    ("loss", "Total loss"),
)
VALIDATION_PREFIX = "val_"


def plot_losses(metrics_file: str | Path, png: str | Path) -> Path:
    """Draw KD, class and total loss over the steps of a metrics.jsonl, with the validation points, and return the file.

    Raises:
        DataError: if the file holds none of the three losses.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_metrics(metrics_file)
    panels = [panel for panel in _PANELS if any(panel[0] in row for row in rows)]
    if not panels:
        raise DataError(
            f"{metrics_file}: no losses to plot; rows with {', '.join(name for name, _ in _PANELS)} are needed"
        )
    width = 5.0 * len(panels)
    figure = Figure(figsize=(width, 3.8))
    # Fixed margins: a layout found by drawing takes longer than the drawing.
    figure.subplots_adjust(left=0.7 / width, right=1 - 0.15 / width, bottom=0.14, top=0.9, wspace=0.2)
    FigureCanvasAgg(figure)  # no pyplot: no global state, no window system
    for axes, (name, title) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw(axes, rows, name)
        axes.set_title(title)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("nats per token")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(png, dpi=150)
    return Path(png)


def _draw(axes: Any, rows: list[dict[str, Any]], name: str) -> None:
    """One metric's curves: every step in a pale line, its running mean, and the validation points."""
    steps, values = _series(rows, name)
    window = max(1, len(values) // 20)
    if window == 1:
        axes.plot(steps, values, color="tab:blue", marker="o" if len(values) == 1 else None, label="training")
    else:
        axes.plot(steps, values, color="tab:blue", alpha=0.3, linewidth=0.8, label="training")
        axes.plot(steps, _running_mean(values, window), color="tab:blue", label=f"training, mean of {window} steps")
    val_steps, val_values = _series(rows, VALIDATION_PREFIX + name)
    if val_steps:
        axes.plot(val_steps, val_values, color="tab:orange", marker="o", markersize=4, label="validation")


def _series(rows: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    found = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def _running_mean(values: list[float], window: int) -> list[float]:
    """Mean of each value and the up to `window` - 1 before it."""
    spans = [values[max(0, i + 1 - window) : i + 1] for i in range(len(values))]
    return [sum(span) / len(span) for span in spans]
