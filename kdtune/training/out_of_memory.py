"""What to change after a run has run out of memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from kdtune.distributed import World
from kdtune.errors import KDTuneError, TrainingError

# Of the device's memory; the driver, the collectives and what the allocator cannot use take the rest.
_USABLE = 0.9
# A run that should have fit is to take at most this share of what it was estimated to take.
_LESS = 0.8


@contextmanager
def explained_out_of_memory(cfg: Any, world: World) -> Iterator[None]:
    """A context in which a device that is out of memory is a TrainingError that says what to change, in order of its price.

    Args:
        cfg: the recipe's, a `TrainingConfig`.
        world: this process's.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        first_line = str(error).strip().splitlines()[0]
        raise TrainingError(f"{world.device} is out of memory: {first_line}\n{_advice(cfg, world)}") from error


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether an error of torch is that of an allocator: CUDA's has a type, those of a CPU and of MPS only a text."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "can't allocate memory" in text


def _advice(cfg: Any, world: World) -> str:
    if world.size > 1 or getattr(cfg, "teacher_processes", 0) > 0:
        return "`kdtune plan CONFIG --world-size N`, with the run's overrides, says what takes how much, and what to change."
    # Needed only here.
    from kdtune.planner.advice import advice_text, changes_to_fit
    from kdtune.planner.estimate import make_estimate

    def peak_of(changed: Any) -> int:
        return make_estimate(changed, World(torch.device("cpu")), device_type=world.device.type).peak.total

    try:
        room = min(_USABLE * _memory(world.device), _LESS * peak_of(cfg))
        return advice_text(list(changes_to_fit(cfg, room, peak_of)), room, str(world.device))
    except KDTuneError as error:  # what the planner does not estimate, such as a teacher of the user's own
        return f"Smaller micro-batches need less: a smaller batch_size and more gradient_accumulation_steps ({error})."


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    from kdtune.planner.hardware import host_memory

    return host_memory()
