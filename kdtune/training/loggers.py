"""Loggers of a step's metrics: to the files and the terminal, and the second one that a config may name (TensorBoard, Weights & Biases)."""

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from kdtune.errors import ConfigError
from kdtune.paths import user_path
from kdtune.runs.metrics_file import JSONLLogger as JSONLLogger  # configs name it kdtune.training.JSONLLogger
from kdtune.runs.metrics_file import read_metrics
from kdtune.runs.progress import Progress
from kdtune.runs.summary import step_numbers, validation_text


class MetricLogger(Protocol):
    """Interface of a config's `metric_logger`."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record named numbers of an optimizer step (1 is the first)."""

    def close(self) -> None:
        """Write all pending values and close."""


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


class StepLog:
    """Write step metrics to metrics.jsonl, the second logger and the terminal.

    Args:
        path: path of metrics.jsonl, which a resumed run continues; None, as on all ranks but 0: no file.
        second: the config's `metric_logger`, closed at the end; it gets every `every`-th step and every validation.
        progress: shows the step, and a line for each validation.
        divergence: display name of `kd_loss`.
    """

    def __init__(
        self,
        path: Path | None,
        second: MetricLogger | None,
        progress: Progress,
        *,
        every: int = 1,
        divergence: str = "KL",
    ) -> None:
        rows = read_metrics(path) if path is not None and path.exists() else []
        self._validated: list[Mapping[str, Any]] = [row for row in rows if "val_class_loss" in row]
        self._file, self._second, self._progress = JSONLLogger(path), second, progress
        self._every, self._divergence = every, divergence

    def log(self, row: Mapping[str, float], step: int) -> None:
        """Record the metrics of a step, or of the validation before the first one (step 0)."""
        self._file.log({"time": round(time.time(), 3), **row}, step)
        is_validated = "val_class_loss" in row
        if self._second is not None and (is_validated or (step > 0 and step % self._every == 0)):
            self._second.log(row, step)
        if step > 0:
            self._progress.step(step, step_numbers(row, divergence=self._divergence))
        if is_validated:
            text = validation_text({"step": step, **row}, self._validated, divergence=self._divergence)
            self._progress.write(text)
            self._validated.append(dict(row))

    def __enter__(self) -> "StepLog":
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.end_steps()
        self._file.close()
        if self._second is not None:
            self._second.close()
