"""Weight dtypes by the names that configs use, and weights that are plain numbers."""

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from kdtune.errors import ConfigError
from kdtune.tensor_types import is_dtensor

_DTYPES = {"fp32": torch.float32, "float32": torch.float32, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16}


def dtype_from_name(name: str) -> torch.dtype:
    """Return the torch dtype for a config's `dtype`: "fp32" or "bf16" (also "float32" and "bfloat16").

    Raises:
        ConfigError: any other name, including fp16, whose gradients below 6e-8 would need a loss scaler.
    """
    if name in _DTYPES:
        return _DTYPES[name]
    if name in {"fp16", "float16", "half"}:
        raise ConfigError(
            f"dtype={name}: not supported, because gradients below 6e-8 become 0 in fp16 without a loss scaler; "
            "use bf16 (the same memory, the range of fp32) or fp32"
        )
    raise ConfigError(f"dtype={name}: unknown; use fp32 or bf16")


def is_plain(weight: Tensor) -> bool:
    """Return whether the weight, or this process's shard of it, is plain numbers, not one of torchao's tensors."""
    return type(weight) in (Tensor, nn.Parameter, FakeTensor) or is_dtensor(weight)
