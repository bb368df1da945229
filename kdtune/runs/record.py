"""A run's own record: the config in config.yaml, and its starts in run.json."""

from pathlib import Path
from typing import Any

from kdtune.config.load import read_resolved
from kdtune.errors import CheckpointError, ConfigError
from kdtune.json_files import read_json

_ADVICE = "put it right, or remove it"
_NOT_OURS = f"it was cut off or changed by hand: {_ADVICE}"


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
    starts = read_json(runs_file, advice=_ADVICE).get("starts")
    if not (isinstance(starts, list) and all(isinstance(start, dict) for start in starts)):
        raise CheckpointError(f"{runs_file}: is no record of a run's starts (a list of objects); {_NOT_OURS}")
    return starts


def last_start(folder: Path) -> dict[str, Any]:
    """Return the latest start record from run.json; empty if there is none. Raises as `recorded_starts`."""
    return (recorded_starts(folder) or [{}])[-1]
