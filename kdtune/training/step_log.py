"""Send step metrics to the files, the second logger and the terminal."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdtune.runs.metrics_file import JSONLLogger, read_metrics
from kdtune.runs.progress import Progress
from kdtune.runs.summary import step_numbers, validation_text
from kdtune.training.loggers import MetricLogger


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
