"""What several processes do together to read and write one model; for a single process everything here is the identity.

One process, the main one (rank 0), names and renames folders and writes what is not sharded. All of them call the same
functions in the same order, because a sharded tensor is made whole by all of them together.
"""

from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

T = TypeVar("T")


def is_distributed() -> bool:
    """Whether this process is one of a group, be it a group of one."""
    return dist.is_available() and dist.is_initialized()


def is_main() -> bool:
    """Whether this process writes what only one may write."""
    return not is_distributed() or dist.get_rank() == 0


def wait_for_all() -> None:
    """Returns once every process is here."""
    if is_distributed():
        dist.barrier()


def from_main(value: T) -> T:
    """The main process's value, on every process. It is pickled, by processes that trust each other."""
    if not is_distributed():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def whole(tensor: Tensor) -> Tensor:
    """The tensor with all of its shards, on every process; called by all of them."""
    if not isinstance(tensor, DTensor):
        return tensor
    # One mesh dimension after the other: tensor parallelism cuts first and FSDP cuts its parts, and torch, asked for all
    # at once, prints a warning that it does the same.
    for dimension in range(len(tensor.placements)):
        placements = [Replicate() if i <= dimension else one for i, one in enumerate(tensor.placements)]
        tensor = tensor.redistribute(placements=placements)
    return tensor.to_local()


def local(tensor: Tensor) -> Tensor:
    """This process's shard, sharing its memory; a plain tensor is its own."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_region(tensor: Tensor) -> tuple[slice, ...]:
    """Where this process's shard lies in the whole tensor, a slice a dimension; empty slices where it has none of it."""
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, length) for length in tensor.shape)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(first, first + length) for first, length in zip(offset, shape, strict=True))


def row_norms(matrix: Tensor) -> Tensor:
    """The Euclidean norms of the rows of which this process has a part, in fp32 or wider; called by all that share them."""
    wide = torch.promote_types(matrix.dtype, torch.float32)
    norms = torch.linalg.vector_norm(local(matrix), dim=1, dtype=wide)
    if isinstance(matrix, DTensor):
        for dimension, placement in enumerate(matrix.placements):
            if placement.is_shard(1):
                squares = norms.square()
                dist.all_reduce(squares, group=matrix.device_mesh.get_group(dimension))
                norms = squares.sqrt()
    return norms


def is_sharded(parameters: Iterable[Tensor]) -> bool:
    """Whether any of them is a shard of a larger one."""
    return any(isinstance(parameter, DTensor) for parameter in parameters)


def reshard(model: nn.Module) -> None:
    """Puts a model's parameters back into shards: FSDP leaves the root's whole after a forward without gradients.

    Until then `model.parameters()` are other objects than the optimizer's.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
