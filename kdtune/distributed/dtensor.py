"""Tensors that may be sharded over processes (DTensor): their full values, their shards, and who writes them.

A plain tensor is a shard that is whole. All processes of a mesh call the functions that all-gather.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch import distributed as dist

from kdtune.distributed.collectives import is_rank_zero
from kdtune.tensor_types import is_dtensor, is_fsdp_module


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor, all-gathered from its shards, on every process; called by all of them."""
    if not is_dtensor(tensor):
        return tensor
    from torch.distributed.tensor import Replicate

    # One mesh dimension after the other: tensor parallelism shards first and FSDP shards its parts; torch, asked for all
    # at once, prints a warning that it does the same.
    for dimension in range(len(tensor.placements)):
        placements = [Replicate() if i <= dimension else one for i, one in enumerate(tensor.placements)]
        tensor = tensor.redistribute(placements=placements)
    return tensor.to_local()


def to_local(tensor: Tensor) -> Tensor:
    """Return this process's shard, sharing its memory; a plain tensor itself."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def local_slices(tensor: Tensor) -> tuple[slice, ...]:
    """Return the slices of the full tensor that this process's shard covers, one per dimension; empty slices if it covers none."""
    if not is_dtensor(tensor):
        return tuple(slice(0, length) for length in tensor.shape)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(first, first + length) for first, length in zip(offset, shape, strict=True))


def row_norms(matrix: Tensor) -> Tensor:
    """Return the Euclidean norms of the rows of which this process has a part, in fp32 or wider; called by all that share them."""
    wide = torch.promote_types(matrix.dtype, torch.float32)
    norms = torch.linalg.vector_norm(to_local(matrix), dim=1, dtype=wide)
    if is_dtensor(matrix):
        for dimension, placement in enumerate(matrix.placements):
            if placement.is_shard(1):
                squares = norms.square()
                dist.all_reduce(squares, group=matrix.device_mesh.get_group(dimension))
                norms = squares.sqrt()
    return norms


def is_first_replica(tensor: Tensor) -> bool:
    """Return whether this process is the first replica of its shard on the tensor's mesh: the one that writes it.

    The norms of a tensor-parallel model are not on its mesh: each of its processes writes them, the same bytes to the same place.
    """
    if not is_dtensor(tensor):
        return is_rank_zero()
    coordinate = tensor.device_mesh.get_coordinate()
    return coordinate is not None and not any(
        position for position, placement in zip(coordinate, tensor.placements, strict=True) if placement.is_replicate()
    )


def to_cpu_copy(tensor: Tensor) -> Tensor:
    """Return a copy in CPU memory that shares nothing with the tensor; of a DTensor, a DTensor with a copy of this shard.

    `clone` and `to` will not do: torchao's optimizer states have no clone, and hand out the same memory for `to`.
    """
    if hasattr(tensor, "__tensor_flatten__"):
        names, context = tensor.__tensor_flatten__()
        parts = {name: getattr(tensor, name) for name in names}  # of a DTensor, its mesh is one of them
        parts = {name: to_cpu_copy(part) if isinstance(part, Tensor) else part for name, part in parts.items()}
        copied: Tensor = type(tensor).__tensor_unflatten__(parts, context, tensor.shape, tensor.stride())  # type: ignore[attr-defined]
        return copied
    return tensor.detach().to("cpu", copy=True)


def is_sharded(parameters: Iterable[Tensor]) -> bool:
    """Return whether any of the tensors is a DTensor, a shard of a larger one."""
    return any(is_dtensor(parameter) for parameter in parameters)


def reshard(model: nn.Module) -> None:
    """Reshard a model's parameters: FSDP leaves the root unsharded after a forward without gradients.

    While it is unsharded, `model.parameters()` are not the optimizer's parameters.
    """
    for module in model.modules():
        if is_fsdp_module(module):
            module.reshard()
