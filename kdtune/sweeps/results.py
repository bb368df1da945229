"""Measurements of a sweep: the metrics of a step from its folder, and results.jsonl with one object per cell."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kdtune.checkpoint import atomic_write_text
from kdtune.json_files import read_json, read_json_lines
from kdtune.sweeps.plan import Cell, Step

DONE, FAILED = "done", "failed"
_OF_LAST_STEP = ("loss", "class_loss", "kd_loss", "total_flops")
_VALIDATION = "val_"
_ADVICE = "remove it, and the sweep runs the step again"


def step_metrics(folder: Path) -> dict[str, float | None]:
    """Return the numbers that a finished step has left in its folder, by name.

    For a training run: the losses of the last step, the operations up to it, and the last validation (metrics.jsonl). For an evaluation:
    its metrics (results.json). {} for a step that leaves neither. None is a number that was not finite.
    """
    found: dict[str, Any] = {}
    if (folder / "metrics.jsonl").exists():
        for row in read_json_lines(folder / "metrics.jsonl"):
            found |= {
                name: value for name, value in row.items() if name in _OF_LAST_STEP or name.startswith(_VALIDATION)
            }
    if (folder / "results.json").exists():
        found |= read_json(folder / "results.json", advice=_ADVICE).get("metrics", {})
    return finite_metrics({name: value for name, value in found.items() if isinstance(value, int | float | None)})


def finite_metrics(metrics: Mapping[str, float | None]) -> dict[str, float | None]:
    """Return the metrics as floats, None for each that is not finite (null in JSON)."""
    return {
        name: None if value is None or not math.isfinite(value) else float(value) for name, value in metrics.items()
    }


def read_record(path: Path) -> dict[str, Any]:
    """Read a finished step's record: metrics, seconds, command, what was deleted; CheckpointError if damaged."""
    return read_json(path, advice=_ADVICE)


def steps_to_run(cell: Cell) -> list[Step]:
    """Return the steps that a cell still needs, in order.

    These are the unfinished steps, and finished ones whose folder lacks an input of one of these: if `discard` deleted it,
    perhaps in another sweep that shares the folder, it has to be made again.
    """
    found: list[Step] = []
    for step in reversed(cell.steps):
        if not step.record.exists() or any(_lacks(step, user) for user in found):
            found.insert(0, step)
    return found


def _lacks(step: Step, user: Step) -> bool:
    """Return whether a part that `user` reads of a finished step's folder, or something inside it, is deleted."""
    gone = read_record(step.record).get("discarded", [])
    return any(
        not part or f"{path}/".startswith(f"{part}/") or f"{part}/".startswith(f"{path}/")
        for part in user.parts_of(step)
        for path in gone
    )


def cell_result(cell: Cell, root: Path, failures: Mapping[str, str]) -> dict[str, Any] | None:
    """Return a cell's row of results.jsonl; None if neither all its steps are finished nor one has failed.

    `failures` are the failed steps, by id, with the last lines they printed; `root` is the sweep's folder, to which the
    folders in the row are relative.
    """
    is_done = all(step.record.exists() for step in cell.steps)
    failed = None if is_done else next((step for step in cell.steps if step.id in failures), None)
    if failed is None and not is_done:
        return None
    records = {step.name: read_record(step.record) for step in cell.steps if step.record.exists()}
    row: dict[str, Any] = {
        "cell": cell.name,
        "axes": dict(cell.axes),
        "status": FAILED if failed else DONE,
        "metrics": {
            f"{name}.{metric}": value for name, record in records.items() for metric, value in record["metrics"].items()
        },
        "seconds": {name: record["seconds"] for name, record in records.items()},
        "folders": {step.name: _from(root, step.folder) for step in cell.steps},
    }
    if failed:
        row |= {"failed_step": failed.name, "error": failures[failed.id], "log": _from(root, failed.log)}
    return row


def _from(root: Path, path: Path) -> str:
    return Path(os.path.relpath(path, root)).as_posix()


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines, atomically; CheckpointError if it cannot be written."""
    atomic_write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
