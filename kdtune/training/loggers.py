"""Metric loggers: metrics.jsonl always, TensorBoard or Weights & Biases if the config names one."""

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol

from kdtune.errors import CheckpointError, ConfigError
from kdtune.paths import user_path


class MetricLogger(Protocol):
    """Interface of a config's `metric_logger`."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record named numbers of an optimizer step (1 is the first)."""

    def close(self) -> None:
        """Write all pending values and close."""


class JSONLLogger:
    """Append one JSON object per line, `step` first, floats unrounded (a non-finite one as null), flushed at once.

    Without a path, as on all ranks but 0, it writes nothing.
    """

    def __init__(self, path: str | Path | None) -> None:
        self._file: IO[str] | None = None
        if path is not None:
            user_path(path).parent.mkdir(parents=True, exist_ok=True)
            self._file = user_path(path).open("a", encoding="utf-8", errors="backslashreplace")

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Append the step's values: numbers, or any other JSON value (such as a sample answer)."""
        if self._file is not None:
            self._file.write(_line({"step": step, **values}))
            self._file.flush()

    def close(self) -> None:
        """Close the file; everything logged is already in it."""
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> "JSONLLogger":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read the rows of a metrics.jsonl, ignoring a truncated last line (of a killed writer).

    Raises:
        CheckpointError: any other line is not a JSON object with a `step`.
    """
    rows = []
    lines = user_path(path).read_text(encoding="utf-8-sig", errors="replace").split("\n")
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is torn or empty
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise CheckpointError(
                f"{path}: line {number} must be a JSON object with a step, is {line[:60]!r}; remove it"
            )
        rows.append(row)
    return rows


def truncate_metrics(path: str | Path, step: int) -> None:
    """Keep a metrics.jsonl's lines up to and including `step`, without a truncated last one. Atomic."""
    path = user_path(path)
    kept = [_line(row) for row in read_metrics(path) if row["step"] <= step]
    draft = path.with_name(path.name + ".tmp")
    with draft.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def _line(row: Mapping[str, Any]) -> str:
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()
    }
    return json.dumps(finite, ensure_ascii=False, allow_nan=False) + "\n"


class TensorBoardLogger:
    """Write scalars for TensorBoard into the folder `log_dir`. Needs `pip install 'kdtune[tensorboard]'`."""

    def __init__(self, log_dir: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing_extra("TensorBoardLogger", "tensorboard") from error
        self._writer = SummaryWriter(str(user_path(log_dir)))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record the step's numbers as scalars."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write all pending values and close."""
        self._writer.close()


class WandBLogger:
    """Send numbers to Weights & Biases; needs `pip install 'kdtune[wandb]'`.

    project, entity, group, name and the rest are `wandb.init`'s.
    `log_dir` is the folder of wandb's files; None: wandb's default.
    """

    def __init__(
        self,
        project: str,
        entity: str | None = None,
        group: str | None = None,
        name: str | None = None,
        log_dir: str | Path | None = None,
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise _missing_extra("WandBLogger", "wandb") from error
        folder = None if log_dir is None else user_path(log_dir)
        is_new = folder is not None and not folder.exists()
        if folder is not None and is_new:
            folder.mkdir(parents=True)  # wandb goes elsewhere where it is missing
        try:
            self._run = wandb.init(project=project, entity=entity, group=group, name=name, dir=log_dir)
        except Exception as error:  # no account, no network: wandb's errors have no narrower class in common
            if folder is not None and is_new:
                shutil.rmtree(folder, ignore_errors=True)
            raise ConfigError(
                f"metric_logger: wandb could not start ({error}); run wandb login, or leave it out"
            ) from error

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send the step's numbers."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def _missing_extra(logger: str, extra: str) -> ConfigError:
    return ConfigError(
        f"metric_logger: {logger} needs the package {extra}, which is not installed; run pip install 'kdtune[{extra}]' "
        "or leave metric_logger out (metrics.jsonl is written anyway)"
    )
