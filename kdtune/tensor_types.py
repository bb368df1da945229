"""Whether a tensor or module is sharded, or quantized, asked without importing torch's classes for it.

torch.distributed.tensor and torch.distributed.fsdp import sympy and 500 modules more: a second of every start, and most runs
have one process. No object can have a class whose module has not been imported.
"""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs

_PLAIN = {"torch.Tensor", "torch.nn.parameter.Parameter", "torch._subclasses.fake_tensor.FakeTensor"}


def is_dtensor(value: object) -> "TypeIs[DTensor]":
    """Return whether a tensor is a DTensor, a shard of a larger one."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def is_fsdp_module(value: object) -> "TypeIs[FSDPModule]":
    """Return whether FSDP2 (`fully_shard`) shards the parameters of a module."""
    module = sys.modules.get("torch.distributed.fsdp")
    return module is not None and isinstance(value, module.FSDPModule)


def is_plain(value: object) -> bool:
    """Return whether a tensor, or this process's shard of it, is plain numbers, not one of torchao's tensors."""
    return f"{type(value).__module__}.{type(value).__qualname__}" in _PLAIN or is_dtensor(value)
