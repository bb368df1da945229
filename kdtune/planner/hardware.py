"""Figures of graphics cards as stated by their makers, of which nothing was measured, and the memory of this machine."""

import os
from dataclasses import dataclass

from kdtune.errors import ConfigError

# Fraction of the stated matrix speed that a training step is assumed to reach.
UTILIZATION = 0.4


@dataclass(frozen=True)
class GPU:
    """Stated figures of a card, in a host of eight.

    Speeds are of dense matrices, without sparsity; fp32 is without TF32, torch's default. A link's figure is one way.
    """

    name: str
    memory_gib: float
    bf16_tflops: float
    fp32_tflops: float
    memory_gb_s: float
    host_link_gb_s: float
    """Bandwidth to the other cards of its host."""
    network_gb_s: float
    """Bandwidth to other hosts, each card having its own network adapter."""
    source: str

    def flops(self, *, is_bf16: bool) -> float:
        """Return the stated floating-point operations per second on matrices in bf16, or in fp32."""
        return 1e12 * (self.bf16_tflops if is_bf16 else self.fp32_tflops)


GPUS_PER_HOST = 8

_A100_LINKS = "NVIDIA A100 data sheet (NVLink 600 GB/s both ways), DGX A100 data sheet (200 Gb/s a GPU)"
_H100_LINKS = "data sheet (NVLink 900 GB/s both ways), DGX H100 data sheet (400 Gb/s a GPU)"
GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("a100-40gb", 40, 312, 19.5, 1555, 300, 25, _A100_LINKS),
        GPU("a100-80gb", 80, 312, 19.5, 2039, 300, 25, _A100_LINKS),
        GPU("h100-80gb", 80, 989, 67, 3350, 450, 50, f"NVIDIA H100 SXM {_H100_LINKS}"),
        GPU("h200-141gb", 141, 989, 67, 4800, 450, 50, f"NVIDIA H200 SXM {_H100_LINKS}"),
    )
}
DEFAULT_GPU = "a100-80gb"


def find_gpu(name: str) -> GPU:
    """Return the card of this name; ConfigError if no card has it."""
    if name not in GPUS:
        raise ConfigError(f"--gpu {name}: unknown; the figures of {', '.join(GPUS)} are known")
    return GPUS[name]


def host_memory() -> int:
    """Return the bytes of this machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
