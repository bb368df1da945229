"""Loss curves of a sweep: each row's losses over the steps for every seed, grouped into comparable panels."""

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdtune.reports.rows import SEED, Row
from kdtune.runs import TrainingRun, divergence_title, read_run, unit_of

# What is drawn, in this order: the metric of metrics.jsonl, its title, and the config keys of a run that say what it is of.
# Where these differ between rows, their curves mean different things and stand in different panels.
_DATA, _HELD_OUT = ("dataset", "tokenizer"), ("dataset_val", "tokenizer")
LOSSES: dict[str, tuple[str, tuple[str, ...]]] = {
    "kd_loss": ("{divergence} to the teacher", (*_DATA, "kd_loss")),
    "class_loss": ("Cross entropy", _DATA),
    "loss": ("Total loss", (*_DATA, "kd_loss", "kd_ratio")),
    "val_kd_loss": ("Held-out {divergence} to the teacher", (*_HELD_OUT, "kd_loss")),
    "val_class_loss": ("Held-out cross entropy", _HELD_OUT),
    "val_agreement": ("Held-out top-1 agreement", _HELD_OUT),
}
# Of runs in which a model writes texts.
TEXTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "rollout_entropy": ("Entropy of the written text, -log q", _DATA),
    "rollout_log_ratio": ("Student against teacher on the written text, log q - log p", _DATA),
    "rollout_overlap": ("Ids among the 16 most likely of both models", _DATA),
    "rollout_tokens": ("Length of the written text", _DATA),
    "rollout_cut_share": ("Texts that the limit has cut", _DATA),
    "rollout_repetition": ("Repetition within a text", _DATA),
    "rollout_staleness": ("Age of the text", _DATA),
    "generated_tokens": ("Tokens written", _DATA),
    "num_valid_tokens": ("Tokens trained on", _DATA),
}
SERIES = LOSSES | TEXTS
TRAINING = ("kd_loss", "class_loss", "loss")
MAX_POINTS = 1000


@dataclass(frozen=True)
class Curve:
    """A metric over the steps of one training run. For a long run each point is the mean of `bin_size` logged values."""

    row: int
    seed: Any
    metric: str
    steps: list[float]
    values: list[float]
    bin_size: int


@dataclass(frozen=True)
class CellRun:
    """The training run whose curves represent a cell, and the number of the cell's row."""

    row: int
    seed: Any
    run: TrainingRun


def read_training(rows: Sequence[Row], root: Path) -> list[CellRun]:
    """Return the training runs of all rows; a cell whose folders have moved has none.

    Of a cell's training runs, the last one that no other row shares is used: the others prepare it.

    Raises:
        CheckpointError: a file of a run is damaged.
    """
    users: dict[str, set[int]] = {}
    for index, row in enumerate(rows):
        for cell in row.cells:
            for folder in cell["folders"].values():
                users.setdefault(folder, set()).add(index)
    found = []
    for index, row in enumerate(rows):
        for cell in row.cells:
            own = [root / folder for folder in cell["folders"].values() if users[folder] == {index}]
            existing = [folder for folder in own if (folder / "metrics.jsonl").exists()]
            if existing:
                found.append(CellRun(index, cell["axes"].get(SEED), read_run(existing[-1])))
    return found


def all_curves(runs: Sequence[CellRun]) -> list[Curve]:
    """Return the curves of some training runs."""
    return [curve for one in runs for curve in _cell_curves(one)]


@dataclass(frozen=True)
class Panel:
    """Comparable curves for one pair of axes: those of a metric, in the rows with these numbers."""

    metric: str
    title: str
    unit: str
    rows: tuple[int, ...]


def comparable_panels(runs: Sequence[CellRun], rows: Collection[int], metrics: Iterable[str]) -> list[Panel]:
    """Return a panel for each metric and each group of rows in which it means the same: same data, divergence and mix.

    A total loss with several kd_ratios is omitted: each weights the two losses differently.
    """
    panels = []
    for metric in metrics:
        title, keys = SERIES[metric]
        groups: dict[str, list[CellRun]] = {}
        drawn = [one for one in runs if one.row in rows and _shows(one.run, metric)]
        for one in drawn:
            meaning = [one.run.meaning(key) for key in keys]
            groups.setdefault(json.dumps(meaning, sort_keys=True, default=str), []).append(one)
        if metric == "loss" and len({json.dumps(one.run.meaning("kd_ratio")) for one in drawn}) > 1:
            continue
        for number, group in enumerate(groups.values(), start=1):
            divergence = divergence_title(group[0].run.config, group[0].run.start)
            name = title.format(divergence=divergence)
            suffix = f" ({number} of {len(groups)}: other data or divergence)" if len(groups) > 1 else ""
            panels.append(
                Panel(
                    metric, name + suffix, unit_of(metric, divergence), tuple(dict.fromkeys(one.row for one in group))
                )
            )
    return panels


def _shows(run: TrainingRun, metric: str) -> bool:
    """Return whether a metric is logged and informative: not a total loss that is the weighted sum of other curves, say."""
    logged = [row for row in run.rows if row.get(metric) is not None]
    if metric == "num_valid_tokens" and not any("generated_tokens" in row for row in run.rows):
        return False  # the data's tokens, in every step as many
    return bool(logged) and not (metric == "loss" and all(_is_mix(row, run.meaning("kd_ratio")) for row in logged))


def _is_mix(row: Mapping[str, Any], kd_ratio: Any) -> bool:
    """Return whether a row's loss is (1 - kd_ratio) * class_loss + kd_ratio * kd_loss."""
    if row.get("class_loss") is None:
        return False
    ratio = kd_ratio if isinstance(kd_ratio, int | float) and row.get("kd_loss") is not None else 0.0
    mix = (1 - ratio) * row["class_loss"] + (ratio * row["kd_loss"] if ratio else 0.0)
    return math.isclose(row["loss"], mix, rel_tol=1e-3)


def _cell_curves(one: CellRun) -> list[Curve]:
    found = []
    for metric in SERIES:
        shown = one.run.rows if _shows(one.run, metric) else []
        points = [(row["step"], row[metric]) for row in shown if row.get(metric) is not None]
        if len(points) > 1:
            bin_size = -(-len(points) // MAX_POINTS)
            steps, values = (_binned([point[part] for point in points], bin_size) for part in (0, 1))
            found.append(Curve(one.row, one.seed, metric, steps, values, bin_size))
    return found


def _binned(values: Sequence[float], size: int) -> list[float]:
    """Return means of `size` neighbours; the last bin may be smaller."""
    bins = [values[start : start + size] for start in range(0, len(values), size)]
    return [sum(part) / len(part) if size > 1 else part[0] for part in bins]
