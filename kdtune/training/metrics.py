"""A step's loss per token and its time, without synchronizing the device between micro-batches."""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import torch

from kdtune.data import Batch
from kdtune.errors import TrainingError


class Metrics:
    """Accumulates sums over micro-batches and gives means per valid token, over all processes.

    The sums stay on their device as they come; `pop` fetches them all in one transfer and adds them in float64.

    Args:
        total: of numbers, their sums over the processes of the run, such as `World.sum`; by default there is one process.
        clock: seconds, for the speed.
    """

    def __init__(
        self,
        total: Callable[[Sequence[float]], list[float]] = list,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._total = total
        self._clock = clock
        self._sums: defaultdict[str, list[torch.Tensor]] = defaultdict(list)
        self._batches: list[Batch] = []
        self._num_tokens = 0.0
        self._started = clock()

    def add(self, parts: Mapping[str, torch.Tensor], batch: Batch) -> None:
        """Add a micro-batch, with its tensors on the CPU: 0-d sums over its valid tokens."""
        for name, value in parts.items():
            self._sums[name].append(value.detach())
        self._batches.append(batch)

    def restart_clock(self) -> None:
        """Leave out of the next step's time what went by until now (a validation, a save)."""
        self._started = self._clock()

    def pop(self) -> dict[str, float]:
        """Mean per valid token of every part, `num_valid_tokens` and `num_padded_tokens`; then starts anew.

        Raises:
            TrainingError: if there was no valid token to average over.
        """
        names = [name for name, values in self._sums.items() for _ in values]
        values = _fetch([value for values in self._sums.values() for value in values])
        own = [math.fsum(value for key, value in zip(names, values, strict=True) if key == name) for name in self._sums]
        counts = [
            sum(batch.num_valid_tokens for batch in self._batches),
            sum(batch.num_tokens for batch in self._batches),
            sum(batch.num_padded_tokens for batch in self._batches),
        ]
        *sums, num_valid_tokens, self._num_tokens, num_padded_tokens = self._total([*own, *counts])
        if num_valid_tokens == 0:
            raise TrainingError("metrics: 0 valid tokens since the last step; every batch needs at least one label")
        result = {name: total / num_valid_tokens for name, total in zip(self._sums, sums, strict=True)}
        result |= {"num_valid_tokens": int(num_valid_tokens), "num_padded_tokens": int(num_padded_tokens)}
        self._sums.clear()
        self._batches.clear()
        return result

    def speed(self, device: torch.device | str) -> dict[str, float]:
        """`step_seconds` since the clock was started, and `tokens_per_second`, without padding, of the step popped last.

        It waits for the device, so that an optimizer's step that was made before counts.
        """
        if torch.device(device).type != "cpu":
            torch.accelerator.synchronize(device)
        seconds = max(self._clock() - self._started, 1e-9)
        return {"step_seconds": seconds, "tokens_per_second": self._num_tokens / seconds}


def _fetch(scalars: list[torch.Tensor]) -> list[float]:
    """The 0-d tensors as Python floats, by one transfer per dtype."""
    found: dict[int, float] = {}
    for dtype in {scalar.dtype for scalar in scalars}:
        indices = [i for i, scalar in enumerate(scalars) if scalar.dtype == dtype]
        found.update(zip(indices, torch.stack([scalars[i] for i in indices]).tolist(), strict=True))
    return [found[i] for i in range(len(scalars))]
