"""A training run as read from its folder: config, record, metrics and answers; and how two runs' settings differ."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdtune.paths import user_path
from kdtune.runs.differences import Difference, differing_values
from kdtune.runs.metrics_file import read_metrics
from kdtune.runs.record import last_start, read_resolved_config


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
    """Read a training run's files from its folder; a metrics.jsonl must exist.

    Raises:
        CheckpointError: a file in it is damaged.
    """
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
