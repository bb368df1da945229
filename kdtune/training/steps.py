"""Count a run's optimizer steps, and collect the micro-batches of each."""

from typing import Any

from kdtune.data import Batch, Loader
from kdtune.errors import ConfigError
from kdtune.training.optim import check_schedule


def count_steps(batches_per_epoch: int | None, batches_per_step: int, max_steps_per_epoch: int | None) -> int:
    """Return the optimizer steps of an epoch; a shorter last one counts. `batches_per_step`: micro-batches per step, of all ranks.

    Raises:
        ConfigError: max_steps_per_epoch is missing for a stream (batches_per_epoch None).
    """
    if batches_per_epoch is None:
        if max_steps_per_epoch is None:
            raise ConfigError("max_steps_per_epoch=null: a streamed dataset has no length; give the steps of an epoch")
        return max_steps_per_epoch
    whole = -(-batches_per_epoch // batches_per_step)
    return whole if max_steps_per_epoch is None else min(whole, max_steps_per_epoch)


def plan_steps(cfg: Any, batches_per_epoch: int | None, batches_per_step: int) -> tuple[int, int]:
    """Return the optimizer steps of an epoch and of the full training; `cfg` is a training recipe's.

    Raises as `count_steps`, and as `check_schedule`.
    """
    steps_per_epoch = count_steps(batches_per_epoch, batches_per_step, cfg.max_steps_per_epoch)
    check_schedule(cfg, cfg.epochs * steps_per_epoch)
    return steps_per_epoch, cfg.epochs * steps_per_epoch


def step_text(batch_size: int, gradient_accumulation_steps: int, num_processes: int) -> str:
    """Describe a step's size for the log: "a step is 2 processes x 4 micro-batches x 8 examples = 64".

    num_processes, gradient_accumulation_steps and batch_size are its factors.
    """
    parts = [(num_processes, "processes"), (gradient_accumulation_steps, "micro-batches"), (batch_size, "examples")]
    shown = [f"{count} {what}" for count, what in parts if count > 1 or what == "examples"]
    total = f" = {batch_size * gradient_accumulation_steps * num_processes}" if len(shown) > 1 else ""
    return f"a step is {' x '.join(shown)}{total}"


def take_micro_batches(loader: Loader, gradient_accumulation_steps: int) -> list[Batch]:
    """Take this process's micro-batches of the next step: fewer at the end of an epoch, which a step never crosses.

    With the loader's tokens_per_micro_batch, as many as the step's examples are cut into.
    """
    start = loader.position
    batches = [next(loader)]
    if loader.tokens_per_micro_batch is not None:
        while loader.position == start:
            batches.append(next(loader))
        return batches
    while len(batches) < gradient_accumulation_steps and loader.position[0] == start[0]:
        batches.append(next(loader))
    return batches


def enter_epoch(loader: Loader, epoch: int) -> None:
    """Go to the start of an epoch if the loader is still in the previous one (which max_steps_per_epoch has cut)."""
    if loader.position[0] < epoch:
        loader.seek((epoch, 0))
