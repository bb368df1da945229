"""Frozen 4-bit weights as torchao's NF4 tensors, with the operations to move, cast and copy that torchao's class lacks.

torchao is imported only when a weight is quantized: its import takes seconds.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kdtune.errors import ConfigError
from kdtune.tensor_types import is_dtensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# Weights that share one scale (QLoRA, arXiv 2305.14314), and the most scales that share one scale of their own.
BLOCK_SIZE = 64
SCALES_AT_MOST = 256
# Of the tensors that make up a weight, those that have as much of each row: 4-bit values, scales, and the scales' scales.
BY_ROWS = ("quantized_data", "quantized_scalers", "quantization_factor")


@contextmanager
def quiet_torchao() -> Iterator[None]:
    """Suppress torchao's import messages about kernels that this torch build lacks; none of them is used here."""
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def quantize_nf4(weight: Tensor) -> nn.Parameter:
    """Return the weight, frozen, in NF4 with double quantization (arXiv 2305.14314): about 0.52 bytes per value.

    The number of values must be a multiple of 64, see `check_nf4_shape`. Scales that share a second-level scale belong to the
    same rows, so that sharding by rows does not change values (`is_cut_by_rows`). A weight on the meta device gives meta parts.
    """
    num_scales = _scales_together(weight.shape)
    if weight.is_meta:
        num_blocks = weight.numel() // BLOCK_SIZE
        parts = {
            "quantized_data": weight.new_empty(weight.numel() // 2, dtype=torch.uint8),
            "quantized_scalers": weight.new_empty(num_blocks, dtype=torch.int8),
            "quantization_factor": weight.new_empty(num_blocks // num_scales),
            "scaler_mean": weight.new_empty(()),
            "nf4": weight.new_empty(16),
        }
        packed = nf4_from_parts(parts, weight.shape, weight.dtype, scaler_block_size=num_scales)
    else:
        with quiet_torchao():
            from torchao.quantization import to_nf4

        packed = to_nf4(weight.detach(), BLOCK_SIZE, num_scales)
    return nn.Parameter(packed, requires_grad=False)


def nf4_from_parts(
    parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype, *, scaler_block_size: int
) -> Tensor:
    """Build torchao's NF4 weight from the tensors that it consists of, given the number of scales per second-level scale."""
    with quiet_torchao():
        from torchao.quantization import NF4Tensor
        from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import SubclassTensorArgs

    stride = torch.empty(shape, device="meta").stride()
    context = {
        "block_size": BLOCK_SIZE,
        "n_blocks": shape.numel() // BLOCK_SIZE,
        "scaler_block_size": scaler_block_size,
        "tensor_meta": SubclassTensorArgs(shape, stride, 0, dtype, parts["quantized_data"].device, False),
    }
    weight: Tensor = NF4Tensor.__tensor_unflatten__(parts, context, shape, stride)
    return weight


def is_cut_by_rows(shape: torch.Size, num_parts: int) -> bool:
    """Return whether an NF4 weight can be sharded by rows evenly over this many processes, with exactly their scales."""
    return math.gcd(shape.numel() // BLOCK_SIZE, shape[0]) % num_parts == 0


def fill_rows(target: Tensor, weight: Tensor, rows: slice) -> None:
    """Copy these rows of an NF4 weight into one that has no others; their number must satisfy `is_cut_by_rows`."""
    for name, part in nf4_parts(weight).items():
        if name in BY_ROWS:
            part = part[len(part) * rows.start // len(weight) : len(part) * rows.stop // len(weight)]
        getattr(target, name).copy_(part)


def _scales_together(shape: torch.Size) -> int:
    """Return how many scales share a second-level scale: the largest number that always belongs to the same rows."""
    num_blocks = shape.numel() // BLOCK_SIZE
    inseparable = num_blocks // math.gcd(num_blocks, shape[0])
    return max(n for n in range(1, SCALES_AT_MOST + 1) if inseparable % n == 0)


def check_nf4_shape(name: str, shape: torch.Size) -> None:
    """Raise a ConfigError that names the module, for a weight whose number of values NF4 cannot hold."""
    if shape.numel() % BLOCK_SIZE:
        raise ConfigError(
            f"quantize_base: {name} has a weight of {list(shape)}, {shape.numel()} values; NF4 takes a multiple of "
            f"{BLOCK_SIZE}: leave the module out of the adapted ones, or set quantize_base to false"
        )


def is_nf4(weight: Tensor) -> bool:
    """Return whether the weight, or this process's shard of it, is one of torchao's NF4 tensors."""
    return type(weight.to_local() if is_dtensor(weight) else weight).__name__ == "NF4Tensor"


def nf4_parts(weight: Tensor) -> dict[str, Tensor]:
    """Return the tensors that an NF4 weight consists of, by torchao's names; those in `BY_ROWS` have equally much of each row."""
    packed: Any = weight
    return {name: getattr(packed, name) for name in packed.__tensor_flatten__()[0]}


def dequantized(weight: Tensor) -> Tensor:
    """Dequantize an NF4 weight to a plain tensor of its dtype, sharded like the weight; any other weight is unchanged."""
    if not is_nf4(weight):
        return weight
    if is_dtensor(weight):
        return _like(weight, dequantized(weight.to_local()))
    packed: Any = weight
    values: Tensor = packed.get_original_weight()
    return values.to(weight.dtype)


def map_nf4(weight: Tensor, function: Callable[[Tensor], Tensor]) -> nn.Parameter:
    """Apply a function, such as a move to another device, to each tensor that the NF4 weight consists of.

    torchao itself requantizes on clone() and dequantizes on .to(dtype).
    """
    if is_dtensor(weight):
        return nn.Parameter(_like(weight, map_nf4(weight.to_local(), function)), requires_grad=False)
    packed: Any = weight
    parts = {name: function(part) for name, part in nf4_parts(weight).items()}
    mapped = nf4_from_parts(parts, weight.shape, parts["nf4"].dtype, scaler_block_size=packed.scaler_block_size)
    return nn.Parameter(mapped, requires_grad=False)


def _like(weight: "DTensor", shard: Tensor) -> "DTensor":
    """Return the same distributed tensor with another shard on this process."""
    mesh, placements = weight.device_mesh, weight.placements
    made: DTensor = type(weight).from_local(
        shard.detach(), mesh, placements, shape=weight.shape, stride=weight.stride()
    )
    return made
