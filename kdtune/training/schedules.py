"""Learning-rate schedules: a warm-up, then a shape, as a factor on each parameter group's own learning rate.

Conventions, with W warm-up steps and T training steps, step k = 0 ... T-1:

* Warm-up: step k uses (k + 1) / W, so the first step already changes weights (torchtune and transformers start at exactly 0:
  that step computes a gradient and discards it) and step W - 1 uses the full rate.
* Afterwards the shape is a function of (k - W) / (T - W), which is 0 at step W and just below 1 at the last step, so
  the last step still changes weights too.
"""

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from kdtune.errors import ConfigError


def get_cosine_schedule_with_warmup(
    optimizer: Optimizer,
    num_warmup_steps: int,
    num_training_steps: int,
    num_cycles: float = 0.5,
    last_epoch: int = -1,
    *,
    min_lr_ratio: float = 0.0,
) -> LambdaLR:
    """Warm-up, then `num_cycles` waves of a cosine (0.5: one fall from 1 to `min_lr_ratio`).

    Args:
        optimizer: the schedule is a factor on each of its parameter groups' own learning rate.
        num_warmup_steps: steps in which the factor rises to 1, from 1 / num_warmup_steps at the first.
        num_training_steps: all steps, including the warm-up; the recipe passes it.
        num_cycles: waves after the warm-up.
        last_epoch: as in torch: the last step made, -1 before the first.
        min_lr_ratio: the factor that the shape falls to.
    """

    def shape(progress: float) -> float:
        return max(0.0, 0.5 * (1.0 + math.cos(2.0 * math.pi * num_cycles * progress)))

    return _with_warmup(optimizer, num_warmup_steps, num_training_steps, _lift(shape, min_lr_ratio), last_epoch)


def get_linear_schedule_with_warmup(
    optimizer: Optimizer,
    num_warmup_steps: int,
    num_training_steps: int,
    last_epoch: int = -1,
    *,
    min_lr_ratio: float = 0.0,
) -> LambdaLR:
    """Warm-up, then a straight fall from 1 to `min_lr_ratio`; the arguments are get_cosine_schedule_with_warmup's."""
    shape = _lift(lambda progress: 1.0 - progress, min_lr_ratio)
    return _with_warmup(optimizer, num_warmup_steps, num_training_steps, shape, last_epoch)


def get_constant_schedule_with_warmup(
    optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int, last_epoch: int = -1
) -> LambdaLR:
    """Warm-up, then the full rate to the end; the arguments are get_cosine_schedule_with_warmup's."""
    return _with_warmup(optimizer, num_warmup_steps, num_training_steps, lambda progress: 1.0, last_epoch)


def get_exponential_schedule_with_warmup(
    optimizer: Optimizer,
    num_warmup_steps: int,
    num_training_steps: int,
    last_epoch: int = -1,
    *,
    min_lr_ratio: float = 0.01,
) -> LambdaLR:
    """Warm-up, then min_lr_ratio ** progress: the same factor each step, down to `min_lr_ratio` (above 0).

    The other arguments are get_cosine_schedule_with_warmup's.
    """
    if not 0.0 < min_lr_ratio <= 1.0:
        raise ConfigError(
            f"lr_scheduler.min_lr_ratio={min_lr_ratio}: an exponential fall ends above 0 and at most at 1"
        )
    shape = lambda progress: min_lr_ratio**progress  # noqa: E731
    return _with_warmup(optimizer, num_warmup_steps, num_training_steps, shape, last_epoch)


def get_inverse_sqrt_schedule_with_warmup(
    optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int, last_epoch: int = -1
) -> LambdaLR:
    """Warm-up, then sqrt(W / (k + 1)), W at least 1 (Vaswani et al. 2017, section 5.3, scaled to a peak of 1).

    The arguments are get_cosine_schedule_with_warmup's.
    """
    _check_steps(num_warmup_steps, num_training_steps)
    peak = max(1, num_warmup_steps)

    def factor(step: int) -> float:
        return (step + 1) / peak if step < peak else math.sqrt(peak / (step + 1))

    return LambdaLR(optimizer, factor, last_epoch)


def get_wsd_schedule(
    optimizer: Optimizer,
    num_warmup_steps: int,
    num_training_steps: int,
    num_decay_steps: int,
    last_epoch: int = -1,
    *,
    decay: str = "linear",
    min_lr_ratio: float = 0.0,
) -> LambdaLR:
    """Warm-up, stable, decay: the full rate until the last `num_decay_steps`, then a fall to `min_lr_ratio`.

    `decay` is "linear", "cosine" or "sqrt" (1 - sqrt(progress), Hägele et al. 2024, arXiv 2405.18392). The other arguments
    are get_cosine_schedule_with_warmup's.
    """
    shapes: dict[str, Callable[[float], float]] = {
        "linear": lambda progress: 1.0 - progress,
        "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
        "sqrt": lambda progress: 1.0 - math.sqrt(progress),
    }
    if decay not in shapes:
        raise ConfigError(f"lr_scheduler.decay={decay!r}: unknown; use one of {', '.join(shapes)}")
    _check_steps(num_warmup_steps, num_training_steps)
    if num_decay_steps < 0 or num_warmup_steps + num_decay_steps > num_training_steps:
        raise ConfigError(
            f"lr_scheduler.num_decay_steps={num_decay_steps}: must be between 0 and the {num_training_steps} training "
            f"steps less the {num_warmup_steps} warm-up steps; lower it"
        )
    shape = _lift(shapes[decay], min_lr_ratio)
    start = num_training_steps - num_decay_steps
    return _with_warmup(optimizer, num_warmup_steps, num_training_steps, shape, last_epoch, start)


def _with_warmup(
    optimizer: Optimizer,
    num_warmup_steps: int,
    num_training_steps: int,
    shape: Callable[[float], float],
    last_epoch: int,
    start: int | None = None,
) -> LambdaLR:
    """Build a warm-up, the full rate until `start` (None: not at all), and `shape` of the progress in [0, 1] from there to the end."""
    _check_steps(num_warmup_steps, num_training_steps)
    begin = num_warmup_steps if start is None else start

    def factor(step: int) -> float:
        if step < num_warmup_steps:
            return (step + 1) / num_warmup_steps
        # LambdaLR asks for the factor of one step past the end, after the last update.
        return 1.0 if step < begin else shape(min(1.0, (step - begin) / max(1, num_training_steps - begin)))

    return LambdaLR(optimizer, factor, last_epoch)


def _lift(shape: Callable[[float], float], min_lr_ratio: float) -> Callable[[float], float]:
    """Rescale `shape` from [0, 1] to [min_lr_ratio, 1]."""
    if not 0.0 <= min_lr_ratio <= 1.0:
        raise ConfigError(f"lr_scheduler.min_lr_ratio={min_lr_ratio}: must be between 0 and 1")
    return lambda progress: min_lr_ratio + (1.0 - min_lr_ratio) * shape(progress)


def _check_steps(num_warmup_steps: int, num_training_steps: int) -> None:
    if num_training_steps < 1:
        raise ConfigError(f"lr_scheduler: {num_training_steps} training steps; at least 1 is needed; train longer")
    if num_warmup_steps < 0:
        raise ConfigError(f"lr_scheduler.num_warmup_steps={num_warmup_steps}: must be 0 or more")
    if num_warmup_steps > num_training_steps:
        raise ConfigError(
            f"lr_scheduler.num_warmup_steps={num_warmup_steps}: longer than the {num_training_steps} training steps, "
            "so the full learning rate would never be reached; lower it or train longer"
        )
