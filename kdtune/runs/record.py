"""A run as read from its folder (config, record, metrics, answers), and the values in which two configs or records differ."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from kdtune.config.load import read_resolved
from kdtune.errors import CheckpointError, ConfigError
from kdtune.json_files import read_json
from kdtune.paths import user_path
from kdtune.runs.metrics_file import read_metrics

ABSENT = object()
"""Stands for a value that one of the two does not have."""


class Difference(NamedTuple):
    """A value that differs between two configs, with its full key, such as "optimizer.lr"."""

    key: str
    was: Any
    is_now: Any

    @property
    def texts(self) -> tuple[str, str, str]:
        """Return the key and both values as they are shown."""
        return self.key, _value(self.was), _value(self.is_now)

    def __str__(self) -> str:
        key, was, is_now = self.texts
        return f"{key}: was {was}, is {is_now}"


def differing_values(key: str, before: Any, now: Any) -> list[Difference]:
    """Return each value that differs, with its full key; mappings are compared key by key."""
    if not (isinstance(before, Mapping) and isinstance(now, Mapping)):
        return [] if before == now else [Difference(key, before, now)]
    names = dict.fromkeys([*before, *now])
    return [
        difference
        for name in names
        for difference in differing_values(f"{key}.{name}", before.get(name, ABSENT), now.get(name, ABSENT))
    ]


def _value(value: Any) -> str:
    return "not given" if value is ABSENT else repr(value)


_ADVICE = "put it right, or remove it"
_NOT_OURS = f"it was cut off or changed by hand: {_ADVICE}"


def read_resolved_config(output_dir: Path) -> dict[str, Any]:
    """Read a run's config.yaml; {} if it was killed before writing it; CheckpointError if it is damaged."""
    path = output_dir / "config.yaml"
    if not path.exists():
        return {}
    try:
        return read_resolved(path)
    except ConfigError as error:
        raise CheckpointError(f"{error}; {_NOT_OURS}") from error


def recorded_starts(folder: Path) -> list[dict[str, Any]]:
    """Return run.json's start records, oldest first; empty without the file; CheckpointError if it is damaged."""
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


@dataclass(frozen=True)
class TrainingRun:
    """Files of a training run.

    config: its config.yaml. rows: rows of metrics.jsonl. samples: rows of samples.jsonl. start: the last start in run.json.
    Fields without a file are empty.
    """

    folder: Path
    config: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    samples: Sequence[Mapping[str, Any]] = field(default=())
    start: Mapping[str, Any] = field(default_factory=dict)

    def fingerprint(self, key: str) -> Any:
        """Return the fingerprint that the run has recorded of a config key's rows, tokenizer or weights; None without one."""
        inputs = self.start.get("inputs")
        return inputs.get(key) if isinstance(inputs, Mapping) else None

    def meaning(self, key: str) -> Any:
        """Return what a config key stands for: its fingerprint, else its value. Without a kd_ratio that is 0."""
        if key == "kd_ratio" and self.config:
            return self.config.get(key, 0.0)
        return self.fingerprint(key) or self.config.get(key)


def read_run(folder: Path) -> TrainingRun:
    """Read a training run's files, of which metrics.jsonl must exist; CheckpointError if one is damaged."""
    samples = folder / "samples.jsonl"
    return TrainingRun(
        folder,
        read_resolved_config(folder),
        read_metrics(folder / "metrics.jsonl"),
        read_metrics(samples) if samples.is_file() else [],
        last_start(folder),
    )


def differences(first: TrainingRun, other: TrainingRun, key: str) -> list[Difference]:
    """Return the differences in what a config key stands for in two runs; [] if it is the same, even under other names.

    If both have recorded a fingerprint it decides, and the settings that differ below the key are the reasons given.
    """
    own, its = first.fingerprint(key), other.fingerprint(key)
    settings = [
        one for one in differing_values(key, first.config.get(key), other.config.get(key)) if not _is_one_file(one)
    ]
    if own is None or its is None:
        return settings
    return [] if own == its else settings or differing_values(key, own, its)


def _is_one_file(difference: Difference) -> bool:
    """Return whether both values are paths of the same file or folder."""
    if not (isinstance(difference.was, str) and isinstance(difference.is_now, str)):
        return False
    paths = [user_path(difference.was), user_path(difference.is_now)]
    try:
        return all(path.exists() for path in paths) and paths[0].samefile(paths[1])
    except (OSError, ValueError):
        return False
