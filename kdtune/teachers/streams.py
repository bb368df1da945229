"""CUDA streams for work that need not wait for what is queued before it; on other devices there are none."""

from collections.abc import Callable

import torch
from torch import Tensor


def side_stream(device: torch.device) -> "torch.cuda.Stream | None":
    """Return a new stream of a CUDA device; None for another device, which does one thing after the other."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def beside(stream: "torch.cuda.Stream", compute: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
    """Queue a computation on a stream, and return a function that makes the current stream wait for its results.

    What is queued on the current stream between the two calls may run at the same time. The host waits for neither.

    Args:
        stream: not the current one.
        compute: returns tensors that it allocates; what else it reads was computed on the current stream.
    """
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        results = compute()
    done = stream.record_event()
    # With `compute` what it reads is kept: the current stream may have that memory for something else only after it has waited.
    held = results, compute

    def wait() -> list[Tensor]:
        current = torch.cuda.current_stream(stream.device)
        current.wait_event(done)
        for tensor in held[0]:
            tensor.record_stream(current)
        return held[0]

    return wait
