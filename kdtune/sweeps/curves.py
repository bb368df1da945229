"""Curves of a sweep: each row's losses over the steps, for every seed, from the metrics.jsonl of its training runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdtune.sweeps.results import read_rows
from kdtune.sweeps.tables import SEED, Row

# (metric of metrics.jsonl, title), in the order they are drawn.
SERIES = (
    ("kd_loss", "KD loss"),
    ("class_loss", "Class loss"),
    ("loss", "Total loss"),
    ("val_kd_loss", "Held-out KL to the teacher"),
    ("val_class_loss", "Held-out cross entropy"),
    ("val_agreement", "Held-out agreement with the teacher"),
)
TRAINING = SERIES[:3]
MAX_POINTS = 1000


@dataclass(frozen=True)
class Curve:
    """A metric over the steps of one training run. Of a long run each point is the mean of `bin_size` logged ones."""

    row: int
    seed: Any
    metric: str
    steps: list[float]
    values: list[float]
    bin_size: int


def read_curves(rows: Sequence[Row], root: Path) -> list[Curve]:
    """The curves of all rows; a cell whose folders are not where its results say has none.

    Of a cell's training runs the last one is drawn that no other row has too: the others prepare it.
    """
    users: dict[str, set[int]] = {}
    for index, row in enumerate(rows):
        for cell in row.cells:
            for folder in cell["folders"].values():
                users.setdefault(folder, set()).add(index)
    found = []
    for index, row in enumerate(rows):
        for cell in row.cells:
            own = [root / folder / "metrics.jsonl" for folder in cell["folders"].values() if users[folder] == {index}]
            existing = [path for path in own if path.exists()]
            if existing:
                found += _cell_curves(index, cell["axes"].get(SEED), read_rows(existing[-1]))
    return found


def _cell_curves(index: int, seed: Any, logged: Sequence[Mapping[str, Any]]) -> list[Curve]:
    found = []
    for metric, _ in SERIES:
        points = [(row["step"], row[metric]) for row in logged if row.get(metric) is not None]
        if len(points) > 1:
            bin_size = -(-len(points) // MAX_POINTS)
            steps, values = (_binned([point[part] for point in points], bin_size) for part in (0, 1))
            found.append(Curve(index, seed, metric, steps, values, bin_size))
    return found


def _binned(values: Sequence[float], size: int) -> list[float]:
    """Means of `size` neighbours; the last bin may be smaller."""
    bins = [values[start : start + size] for start in range(0, len(values), size)]
    return [sum(part) / len(part) if size > 1 else part[0] for part in bins]


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value and the up to `window` - 1 before it."""
    spans = [values[max(0, end - window) : end] for end in range(1, len(values) + 1)]
    return [sum(span) / len(span) for span in spans]
