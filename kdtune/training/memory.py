"""Peak memory of a run."""

import resource
import sys

import torch

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
