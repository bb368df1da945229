"""The output folder of a run: may it be used, what is written into it at the start, what a resumed run may change."""

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from kdtune.checkpoint import atomic_write_text
from kdtune.errors import ConfigError

_TRACES = ("config.yaml", "metrics.jsonl", "final")


def holds_run(output_dir: Path) -> bool:
    """True if the folder has traces of a run: its config, metrics, a step folder or a final model."""
    return any((output_dir / name).exists() for name in _TRACES) or any(output_dir.glob("step_*"))


def output_dir_problems(output_dir: str, *, resume: bool) -> list[str]:
    """Why a run could not write there, without writing anything."""
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        return [f"output_dir={output_dir}: is a file; name a folder"]
    if not resume and holds_run(folder):
        return [
            f"output_dir={output_dir}: already holds a run; go on with it by resume_from_checkpoint=true, "
            "or choose another output_dir"
        ]
    parent = folder
    while not parent.exists():
        parent = parent.parent
    if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        return [f"output_dir={output_dir}: {parent} is not a folder that can be written to; choose another output_dir"]
    return []


def write_run_files(folder: Path, *, resolved_config: str, record: Mapping[str, Any]) -> None:
    """Writes `config.yaml` (every value) and `run.json` (versions and command line, one entry per start) into a folder.

    Raises:
        CheckpointError: where it cannot be written.
    """
    atomic_write_text(folder / "config.yaml", resolved_config)
    runs_file = folder / "run.json"
    starts = json.loads(runs_file.read_text())["starts"] if runs_file.exists() else []
    atomic_write_text(runs_file, json.dumps({"starts": [*starts, dict(record)]}, indent=1) + "\n")


def check_unchanged(before: Mapping[str, Any], now: Mapping[str, Any], *, may_change: Collection[str]) -> None:
    """Refuses to go on with a run under a config that would make it another run.

    Args:
        before: the config that the run was started with, key by key.
        now: the config it is resumed with.
        may_change: keys that do not change the numbers, or that the user may extend.

    Raises:
        ConfigError: naming each key that differs, with both values.
    """
    changed = [key for key in now if key not in may_change and key in before and before[key] != now[key]]
    if changed:
        lines = "\n".join(f"  {key}: was {before[key]!r}, is {now[key]!r}" for key in changed)
        raise ConfigError(
            f"the run in output_dir was started with another config; a resumed run keeps these keys:\n{lines}\n"
            "take the changes back, or choose another output_dir for a new run"
        )
