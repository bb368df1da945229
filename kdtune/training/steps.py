"""How many optimizer steps a run has, and which micro-batches belong to one."""

from typing import Any

from kdtune.data import Batch, Loader
from kdtune.errors import ConfigError
from kdtune.training.optim import check_schedule


def count_steps(batches_per_epoch: int | None, batches_per_step: int, max_steps_per_epoch: int | None) -> int:
    """Optimizer steps an epoch; a last, shorter one counts. `batches_per_step`: micro-batches of a step, of all processes.

    Raises:
        ConfigError: for a stream (batches_per_epoch None) without max_steps_per_epoch.
    """
    if batches_per_epoch is None:
        if max_steps_per_epoch is None:
            raise ConfigError("max_steps_per_epoch=null: a streamed dataset has no length; give the steps of an epoch")
        return max_steps_per_epoch
    whole = -(-batches_per_epoch // batches_per_step)
    return whole if max_steps_per_epoch is None else min(whole, max_steps_per_epoch)


def plan_steps(cfg: Any, batches_per_epoch: int | None, batches_per_step: int) -> tuple[int, int]:
    """Optimizer steps an epoch, as `count_steps` has them, and of the whole training; `cfg` is a training recipe's.

    Raises:
        ConfigError: as `count_steps`; or the schedule cannot go through so many, as `check_schedule`.
    """
    steps_per_epoch = count_steps(batches_per_epoch, batches_per_step, cfg.max_steps_per_epoch)
    check_schedule(cfg, cfg.epochs * steps_per_epoch)
    return steps_per_epoch, cfg.epochs * steps_per_epoch


def step_text(batch_size: int, gradient_accumulation_steps: int, num_processes: int) -> str:
    """Describe a step's size for the log: "a step is 2 processes x 4 micro-batches x 8 examples = 64".

    num_processes, gradient_accumulation_steps and batch_size are these three numbers.
    """
    parts = [(num_processes, "processes"), (gradient_accumulation_steps, "micro-batches"), (batch_size, "examples")]
    shown = [f"{count} {what}" for count, what in parts if count > 1 or what == "examples"]
    total = f" = {batch_size * gradient_accumulation_steps * num_processes}" if len(shown) > 1 else ""
    return f"a step is {' x '.join(shown)}{total}"


def take_micro_batches(loader: Loader, gradient_accumulation_steps: int) -> list[Batch]:
    """This process's micro-batches of the next step: fewer at the end of an epoch, which a step never crosses."""
    epoch = loader.position[0]
    batches = [next(loader)]
    while len(batches) < gradient_accumulation_steps and loader.position[0] == epoch:
        batches.append(next(loader))
    return batches


def enter_epoch(loader: Loader, epoch: int) -> None:
    """Goes to the start of an epoch, if the loader is still in the one before (max_steps_per_epoch has cut it)."""
    if loader.position[0] < epoch:
        loader.seek((epoch, 0))
