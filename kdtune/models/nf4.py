"""Frozen weights in 4 bits, as torchao's NF4 tensors: what that class lacks for models that move, are cast and copied.

torchao is imported only where a weight is quantized: its import takes seconds.
"""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kdtune.errors import ConfigError

# Weights that share one scale (QLoRA, arXiv 2305.14314), and the most scales that share one scale of their own.
BLOCK_SIZE = 64
SCALES_AT_MOST = 256


@contextmanager
def quiet_torchao() -> Iterator[None]:
    """Holds back what torchao says at import about kernels that this torch build lacks; none of them is used here."""
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
    """The weight, frozen, in NF4 with double quantization (arXiv 2305.14314): about 0.52 bytes a value.

    The number of values must be a multiple of 64, see `check_nf4_shape`.
    """
    with quiet_torchao():
        from torchao.quantization import to_nf4

    num_blocks = weight.numel() // BLOCK_SIZE
    return nn.Parameter(to_nf4(weight.detach(), BLOCK_SIZE, math.gcd(num_blocks, SCALES_AT_MOST)), requires_grad=False)


def nf4_bytes(num_values: int, itemsize: int) -> int:
    """Bytes of a weight that `quantize_nf4` has made of so many values, which took `itemsize` bytes each."""
    num_blocks = num_values // BLOCK_SIZE
    # A mean, a table of 16 values and a scale for every group of scales are in the weight's own dtype.
    num_wide = 1 + 16 + num_blocks // math.gcd(num_blocks, SCALES_AT_MOST)
    return num_values // 2 + num_blocks + num_wide * itemsize


def check_nf4_shape(name: str, shape: torch.Size) -> None:
    """Raises ConfigError, with the module's name, for a weight whose number of values NF4 cannot take."""
    if shape.numel() % BLOCK_SIZE:
        raise ConfigError(
            f"quantize_base: {name} has a weight of {list(shape)}, {shape.numel()} values; NF4 takes a multiple of "
            f"{BLOCK_SIZE}: leave the module out of the adapted ones, or set quantize_base to false"
        )


def is_nf4(weight: Tensor) -> bool:
    """Whether the weight is one of torchao's NF4 tensors."""
    return type(weight).__name__ == "NF4Tensor"


def dequantized(weight: Tensor) -> Tensor:
    """A plain tensor of the weight's dtype: the values that an NF4 weight stands for, any other weight as it is."""
    if not is_nf4(weight):
        return weight
    packed: Any = weight
    values: Tensor = packed.get_original_weight()
    return values.to(weight.dtype)


def map_nf4(weight: Tensor, function: Callable[[Tensor], Tensor]) -> nn.Parameter:
    """The NF4 weight with the function applied to each tensor that it is made of, such as a move to another device.

    torchao itself quantizes anew on clone() and dequantizes on .to(dtype).
    """
    packed: Any = weight
    names, context = packed.__tensor_flatten__()
    parts = {name: function(getattr(packed, name)) for name in names}
    like = parts["nf4"]
    tensor_meta = replace(context["tensor_meta"], dtype=like.dtype, device=like.device, requires_grad=False)
    context = {**context, "tensor_meta": tensor_meta}
    return nn.Parameter(type(packed).__tensor_unflatten__(parts, context, None, None), requires_grad=False)
