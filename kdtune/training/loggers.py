"""Metric loggers that a config may name, beside metrics.jsonl: TensorBoard and Weights & Biases."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from kdtune.errors import ConfigError
from kdtune.paths import user_path
from kdtune.runs.metrics_file import JSONLLogger as JSONLLogger  # configs name it kdtune.training.JSONLLogger


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
