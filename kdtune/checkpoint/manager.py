"""The step folders of a run: write them atomically, find the complete ones, delete the surplus ones.

A step folder `step_N/` is a Hugging Face model folder, or of a model with adapters a PEFT folder, with the resume state in
`step_N/state/`.
"""

import math
import re
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch.optim import Optimizer

from kdtune.checkpoint import huggingface, peft, state
from kdtune.checkpoint.atomic import atomic_folder, clean_leftovers, remove_folder
from kdtune.checkpoint.save import SupportsSave, adapter_writer, model_writer
from kdtune.distributed import background_group, is_rank_zero, raise_on_all_ranks, reshard
from kdtune.errors import CheckpointError, ConfigError
from kdtune.log import get_logger
from kdtune.models import Transformer, has_adapters
from kdtune.paths import user_path

if TYPE_CHECKING:
    from torch.distributed.checkpoint.stateful import Stateful

STATE_DIR = "state"
_STEP = re.compile(r"step_(\d+)")
# For metrics with one of these suffixes higher is better; for losses lower.
_HIGHER_IS_BETTER = ("agreement", "accuracy")


def step_folders(output_dir: str | Path) -> list[Path]:
    """Return the complete step folders of a run, oldest first. One without weights, config or state is incomplete."""
    folder = user_path(output_dir)
    found = [path for path in folder.glob("step_*") if _STEP.fullmatch(path.name)] if folder.is_dir() else []
    return sorted((path for path in found if _is_whole(path)), key=step_number)


def newest_step(output_dir: str | Path) -> Path | None:
    """Return the newest complete step folder, or None."""
    return next(reversed(step_folders(output_dir)), None)


def best_step(output_dir: str | Path, metric: str | None) -> Path | None:
    """Return the complete step folder with the best value of `metric`; None without a metric or a folder that has it.

    Only reads, so the run may still be in progress.
    """
    if metric is None:
        return None
    values = {folder: _metric(folder, metric) for folder in step_folders(output_dir)}
    known = {folder: value for folder, value in values.items() if value is not None}
    if not known:
        return None
    choose = max if metric.endswith(_HIGHER_IS_BETTER) else min
    return choose(known, key=lambda folder: known[folder])


def _metric(folder: Path, name: str) -> float | None:
    value = state.read_state_file(folder / STATE_DIR)["extra"]["metrics"].get(name)
    return None if value is None or math.isnan(value) else float(value)


def step_number(folder: Path) -> int:
    """N of a folder named `step_N`."""
    match = _STEP.fullmatch(folder.name)
    assert match, folder
    return int(match[1])


def _is_whole(folder: Path) -> bool:
    if peft.is_adapter_folder(folder):
        needed = [folder / peft.CONFIG, folder / peft.WEIGHTS]
        return all(file.is_file() for file in needed) and state.is_whole_state(folder / STATE_DIR)
    try:
        weights = huggingface.weight_files(folder)
    except CheckpointError:  # its index is damaged
        return False
    needed = [*weights, folder / huggingface.CONFIG]
    return bool(weights) and all(file.is_file() for file in needed) and state.is_whole_state(folder / STATE_DIR)


class CheckpointManager:
    """Write the step folders of one run and keep the configured number of them.

    A context manager: on exit it waits for a save in the background, except after Ctrl-C.

    Args:
        output_dir: the run's folder. Incomplete saves that a killed run left in it are removed.
        keep_last_n: number of complete step folders to keep besides the best one; None: all.
        best_metric: name of the metric that decides which step is the best; None: no step is.
        async_save: `save` returns once everything is copied to CPU memory, and a background thread writes the copy, one
            save at a time. The threads of all processes communicate in their own process group.
    """

    def __init__(
        self,
        output_dir: str | Path,
        *,
        keep_last_n: int | None = None,
        best_metric: str | None = None,
        async_save: bool = False,
    ) -> None:
        if keep_last_n is not None and keep_last_n < 1:
            raise ConfigError(f"keep_last_n_checkpoints={keep_last_n}: must be 1 or more; leave it out to keep all")
        self.output_dir = user_path(output_dir)
        self.keep_last_n = keep_last_n
        self.best_metric = best_metric
        self.async_save = async_save
        self._group = background_group() if async_save else None
        self._writing: Future[None] | None = None
        if is_rank_zero():
            clean_leftovers(self.output_dir)

    def save(
        self,
        step: int,
        *,
        model: Transformer,
        optimizer: Optimizer,
        scheduler: "Stateful | None" = None,
        loss: "Stateful | None" = None,
        rollouts: "Stateful | None" = None,
        extra: Mapping[str, Any],
        metrics: Mapping[str, float],
        base: str | Path | None = None,
        tokenizer: SupportsSave | None = None,
        is_chat: bool = False,
    ) -> Path:
        """Write `step_N`, model and state in one atomic folder, delete the surplus ones, and return the folder.

        Of a model with adapters, only the adapters are written, as a PEFT folder: the base does not change.
        `extra` and `metrics` are kept in the state; `metrics` of this step, by which the best one is found.
        `base`, `tokenizer` and `is_chat`: as in `save_model`.
        With `async_save`, waits for the previous save first; the folder gets its final name later.

        Raises:
            CheckpointError: the folder exists already, or the disk is full or cannot be written. With `async_save`, an
                error of the background write is raised by the next `save` or `wait`.
        """
        self.wait()
        folder = self.output_dir / f"step_{step}"
        reshard(model)
        writer = adapter_writer if has_adapters(model) else model_writer
        write_model = writer(model, base=base, tokenizer=tokenizer, is_chat=is_chat, staged=self.async_save)
        write_state = state.state_writer(
            model=model,
            optimizer=optimizer,
            scheduler=scheduler,
            loss=loss,
            rollouts=rollouts,
            extra={**extra, "step": step, "metrics": dict(metrics)},
            staged=self.async_save,
        )

        def write() -> None:
            with atomic_folder(folder, group=self._group) as hidden:
                write_model(hidden, self._group)
                write_state(hidden / STATE_DIR, self._group)
            with raise_on_all_ranks(self._group):
                if is_rank_zero():
                    self._delete_old()

        if self.async_save:
            self._writing = _in_background(write)
        else:
            write()
        return folder

    def wait(self) -> None:
        """Wait until no save is in progress; CheckpointError if a background save failed."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.wait()
        elif isinstance(error, Exception):
            # The run ends with its own error; what it had saved by then is worth keeping.
            try:
                self.wait()
            except Exception as second:
                get_logger(__name__).error("the last checkpoint was not written: %s", second)

    def _delete_old(self) -> None:
        if self.keep_last_n is None:
            return
        best = best_step(self.output_dir, self.best_metric)
        for folder in step_folders(self.output_dir)[: -self.keep_last_n]:
            if folder != best:
                remove_folder(folder)


def _in_background(function: Callable[[], None]) -> Future[None]:
    """Run `write` in a thread and record its error, if any. The thread does not keep the process from ending.

    Not dcp.async_save: weights, resume state and the rename are one unit here.
    """
    future: Future[None] = Future()
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def run() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)  # a new thread has the first one
            function()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(None)

    Thread(target=run, name="checkpoint", daemon=True).start()
    return future


def discard_steps_after(output_dir: str | Path, step: int) -> None:
    """Remove incomplete step folders later than `step`, which a resumed run will write again."""
    for path in user_path(output_dir).glob("step_*"):
        if _STEP.fullmatch(path.name) and step_number(path) > step:
            if _is_whole(path):
                raise CheckpointError(f"{path}: is whole and newer than step {step}; resume from it, or move it away")
            remove_folder(path)
