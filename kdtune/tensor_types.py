"""Whether an object is sharded over processes, asked without importing torch's classes for it.

torch.distributed.tensor and torch.distributed.fsdp import sympy and 500 modules more: a second of every start, and most runs
have one process. No object can have a class whose module has not been imported.
"""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs


def is_dtensor(value: object) -> "TypeIs[DTensor]":
    """Return whether a tensor is a DTensor, a shard of a larger one."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def is_fsdp_module(value: object) -> "TypeIs[FSDPModule]":
    """Return whether FSDP2 (`fully_shard`) shards the parameters of a module."""
    module = sys.modules.get("torch.distributed.fsdp")
    return module is not None and isinstance(value, module.FSDPModule)
