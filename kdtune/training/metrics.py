"""A step's loss per token, its time and the peak memory, without synchronizing the device between micro-batches."""

import math
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from kdtune.data import Batch
from kdtune.distributed import SINGLE_PROCESS, World
from kdtune.errors import TrainingError


class Metrics:
    """Accumulate sums over micro-batches and return means per valid token, over all processes.

    The sums stay on their device; `pop` fetches them all in one transfer and adds them in float64.

    Args:
        world: the processes of the run.
        clock: returns seconds, for the speed.
        teacher_wait: returns the seconds waited for the teacher's files since it was last called; None: there are none.
    """

    def __init__(
        self,
        world: World = SINGLE_PROCESS,
        *,
        clock: Callable[[], float] = time.perf_counter,
        teacher_wait: Callable[[], float] | None = None,
    ) -> None:
        self._world = world
        self._clock, self._teacher_wait = clock, teacher_wait
        self._sums: defaultdict[str, list[torch.Tensor]] = defaultdict(list)
        self._counts = [0, 0, 0, 0]  # valid, all but padding, padding, floating-point operations
        self._data_seconds = 0.0
        self._since = clock()

    def add(self, parts: Mapping[str, torch.Tensor], batch: Batch, *, flops: int = 0) -> None:
        """Add a micro-batch, on any device: 0-d sums over its valid tokens, and the floating-point operations that it takes."""
        for name, value in parts.items():
            self._sums[name].append(value.detach())
        own = (batch.num_valid_tokens, batch.num_tokens, batch.num_padded_tokens, flops)
        self._counts = [total + count for total, count in zip(self._counts, own, strict=True)]

    def restart_clock(self) -> None:
        """Restart the timing of the next step from now."""
        self._since = self._clock()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A context whose time does not count as the next step's: a validation, a save."""
        since = self._clock()
        yield
        self._since += self._clock() - since

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """A context whose time is the step's `data_seconds`: the wait for its batches."""
        since = self._clock()
        yield
        self._data_seconds += self._clock() - since

    def pop(self, **scalars: torch.Tensor) -> dict[str, float]:
        """Return the mean per valid token of every part, the scalars unchanged, counts and speed; then reset.

        This waits for the device, the only time in a step. A step's time, `step_seconds`, is that since the last such wait: it
        has the optimizer's step before in it, so that `tokens_per_second`, without padding, counts all that a step takes.
        `data_seconds`, a part of it, is the wait for the step's batches, the mean over the processes; `teacher_seconds`, if the
        teacher reads files, the wait for these.

        Args:
            scalars: 0-d tensors that are the same on all processes, such as the gradient norm; fetched in the same transfer.

        Raises:
            TrainingError: there was no valid token to average over.
        """
        names = [*(name for name, values in self._sums.items() for _ in values), *scalars]
        values = _fetch([*(value for values in self._sums.values() for value in values), *scalars.values()])
        now, parts = self._clock(), list(self._sums)
        own = [math.fsum(value for key, value in zip(names, values, strict=True) if key == name) for name in parts]
        waits = {"data_seconds": self._data_seconds}
        if self._teacher_wait is not None:
            waits["teacher_seconds"] = self._teacher_wait()
        summed = self._world.sum([*own, *self._counts, *waits.values()])
        *sums, num_valid_tokens, num_tokens, num_padded_tokens, flops = summed[: -len(waits)]
        seconds_of = (seconds / self._world.dp_size for seconds in summed[-len(waits) :])
        waits = dict(zip(waits, seconds_of, strict=True))
        if num_valid_tokens == 0:
            raise TrainingError("metrics: 0 valid tokens since the last step; every batch needs at least one label")
        seconds = max(now - self._since, 1e-9)
        self._since = now
        self._sums.clear()
        self._counts, self._data_seconds = [0, 0, 0, 0], 0.0
        return {
            **{name: total / num_valid_tokens for name, total in zip(parts, sums, strict=True)},
            "num_valid_tokens": int(num_valid_tokens),
            "num_padded_tokens": int(num_padded_tokens),
            "flops": flops,
            **dict(zip(scalars, values[len(values) - len(scalars) :], strict=True)),
            "step_seconds": seconds,
            **waits,
            "tokens_per_second": num_tokens / seconds,
        }


def _fetch(scalars: list[torch.Tensor]) -> list[float]:
    """Fetch the 0-d tensors as Python floats, in one transfer per dtype and device."""
    found: dict[int, float] = {}
    for kind in {(scalar.dtype, scalar.device) for scalar in scalars}:
        indices = [i for i, scalar in enumerate(scalars) if (scalar.dtype, scalar.device) == kind]
        found.update(zip(indices, torch.stack([scalars[i] for i in indices]).tolist(), strict=True))
    return [found[i] for i in range(len(scalars))]


_GIB = 2**30


def memory_stats(device: torch.device | str) -> dict[str, float]:
    """Return the memory in GiB since the process began.

    cuda: `peak_memory_alloc` (tensors) and `peak_memory_reserved` (what torch took from the driver). mps:
    `memory_alloc` and `memory_reserved` now, as Metal keeps no peak. cpu: `peak_memory_rss`, the largest resident set
    of the process.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return {
            "peak_memory_alloc": torch.cuda.max_memory_allocated(device) / _GIB,
            "peak_memory_reserved": torch.cuda.max_memory_reserved(device) / _GIB,
        }
    if device.type == "mps":
        return {
            "memory_alloc": torch.mps.current_allocated_memory() / _GIB,
            "memory_reserved": torch.mps.driver_allocated_memory() / _GIB,
        }
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    return {"peak_memory_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _GIB}
