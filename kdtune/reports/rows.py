"""Rows of a sweep's tables: the finished cells that differ only in the seed."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdtune.reports.statistics import Summary, summarize
from kdtune.sweeps.plan import label
from kdtune.sweeps.results import DONE

SEED = "seed"
STANDARD_ERROR = "_stderr"


@dataclass(frozen=True)
class Row:
    """The finished cells that differ only in the seed."""

    axes: Mapping[str, Any]
    cells: tuple[Mapping[str, Any], ...]

    @property
    def name(self) -> str:
        """Axis values in one line."""
        return label(self.axes) or "all cells"

    def values(self, metric: str) -> dict[Any, float]:
        """Return the metric of each cell that has it as a finite number, by seed."""
        found = {cell["axes"].get(SEED): cell["metrics"].get(metric) for cell in self.cells}
        return {seed: value for seed, value in found.items() if value is not None and math.isfinite(value)}

    def counts(self, metric: str) -> tuple[int, int]:
        """Return how many cells have the metric as a finite number, and how many cells there are; (0, 0) if none measured it."""
        measured = any(metric in cell["metrics"] for cell in self.cells)
        return len(self.values(metric)), len(self.cells) if measured else 0

    def document_error(self, metric: str) -> float | None:
        """Return the task's own standard error of the metric, over its documents, for one seed; None if it gives none."""
        name, comma, answer_filter = metric.partition(",")
        errors = self.values(f"{name}{STANDARD_ERROR}{comma}{answer_filter}")
        values = self.values(metric)
        return errors.get(next(iter(values))) if len(values) == 1 else None

    def summary(self, metric: str) -> Summary | None:
        """Return mean and standard error of a metric; None if no cell has it."""
        values = self.values(metric)
        return summarize(list(values.values())) if values else None


def rows_over_seeds(results: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Group the finished cells of a results.jsonl by all axes but `seed`, in order of first appearance.

    If a row has several cells of one seed, only the first is kept, so that no run counts twice (see `repeated_cells`).
    """
    groups: dict[str, dict[Any, Mapping[str, Any]]] = {}
    for cell in results:
        if cell["status"] == DONE:
            groups.setdefault(_row_key(cell), {}).setdefault(cell["axes"].get(SEED), cell)
    return [
        Row(_without_seed(next(iter(of_seed.values()))["axes"]), tuple(of_seed.values())) for of_seed in groups.values()
    ]


def repeated_cells(results: Iterable[Mapping[str, Any]]) -> list[str]:
    """Describe finished cells that share a row and a seed, one sentence for each row and seed, with their line numbers."""
    lines: dict[tuple[str, Any], list[int]] = {}
    names: dict[tuple[str, Any], str] = {}
    for number, cell in enumerate(results, start=1):
        if cell["status"] == DONE:
            key = (_row_key(cell), cell["axes"].get(SEED))
            lines.setdefault(key, []).append(number)
            names.setdefault(key, label(cell["axes"]) or "the only cell")
    return [
        f"results: lines {', '.join(map(str, found[:-1]))} and {found[-1]} are {'both' if len(found) == 2 else 'all'} of one "
        f"row and seed, {names[key]}; keep one of them, or tell them apart by an axis"
        for key, found in lines.items()
        if len(found) > 1
    ]


def _row_key(cell: Mapping[str, Any]) -> str:
    return json.dumps(_without_seed(cell["axes"]), sort_keys=True)


def _without_seed(axes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in axes.items() if name != SEED}


def axis_names(rows: Sequence[Row]) -> list[str]:
    """Return the axes of the rows, in order of first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row.axes))
