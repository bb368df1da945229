"""A run's own record: the config in config.yaml, and its starts in run.json."""

import json
from pathlib import Path
from typing import Any

from kdtune.config.load import read_resolved
from kdtune.errors import CheckpointError, ConfigError

_NOT_OURS = "it was cut off or changed by hand: put it right, or remove it"


def read_resolved_config(output_dir: Path) -> dict[str, Any]:
    """Read the config a run was started with, key by key; empty if it was killed before writing it.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = output_dir / "config.yaml"
    if not path.exists():
        return {}
    try:
        return read_resolved(path)
    except ConfigError as error:
        raise CheckpointError(f"{error}; {_NOT_OURS}") from error


def recorded_starts(folder: Path) -> list[dict[str, Any]]:
    """Return the start records from run.json, oldest first; empty if there is no such file.

    Raises:
        CheckpointError: the file is damaged.
    """
    runs_file = folder / "run.json"
    if not runs_file.exists():
        return []
    try:
        starts = json.loads(runs_file.read_text(encoding="utf-8-sig"))["starts"]
        if not (isinstance(starts, list) and all(isinstance(start, dict) for start in starts)):
            raise TypeError("starts must be a list of objects")
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{runs_file}: is no record of a run's starts ({error}); {_NOT_OURS}") from error
    return starts


def last_start(folder: Path) -> dict[str, Any]:
    """Return the latest start record from run.json; empty if there is none. Raises as `recorded_starts`."""
    return (recorded_starts(folder) or [{}])[-1]
