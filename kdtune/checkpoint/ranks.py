"""What several processes do together to read and write one model; for a single process everything here is the identity.

One process, the main one (rank 0), names and renames folders and writes what is not sharded. All of them call the same
functions in the same order, because a sharded tensor is made whole by all of them together.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from kdtune.errors import KDTuneError

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


@contextmanager
def together(group: ProcessGroup | None = None) -> Iterator[None]:
    """A block that no process leaves before all have; an error of ours in one of them is raised by all.

    Raises:
        KDTuneError: of the same kind and text as in the process where the block failed.
    """
    failure: KDTuneError | None = None
    try:
        yield
    except KDTuneError as error:
        failure = error
    if is_distributed():
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, failure and (type(failure), str(failure)), group=group)
        first = next((one for one in found if one is not None), None)
        if failure is None and first is not None:
            kind, text = first
            raise kind(text)
    if failure is not None:
        raise failure


def background_group() -> ProcessGroup | None:
    """A group of all processes for a thread beside training, whose messages never mix with training's; None for one process.

    Called by all of them. It waits as long as the run's own group.
    """
    if not is_distributed():
        return None
    run_group = dist.distributed_c10d._get_default_group()
    timeout = run_group._get_backend(torch.device("cpu")).options._timeout
    group: ProcessGroup = dist.new_group(backend="gloo", timeout=timeout)
    return group


def from_main(value: T, group: ProcessGroup | None = None) -> T:
    """The main process's value, on every process. It is pickled, by processes that trust each other."""
    if not is_distributed():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group, device=torch.device("cpu"))
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


def holds_first(tensor: Tensor) -> bool:
    """Whether this process is the first of those that hold the same shard on the tensor's mesh: the one that writes it.

    Norms are not on the mesh of tensor parallelism: there each of its processes writes them, the same bytes to the same place.
    """
    if not isinstance(tensor, DTensor):
        return is_main()
    coordinate = tensor.device_mesh.get_coordinate()
    return coordinate is not None and not any(
        position for position, placement in zip(coordinate, tensor.placements, strict=True) if placement.is_replicate()
    )


def to_cpu_copy(tensor: Tensor) -> Tensor:
    """A copy in the CPU's memory that shares nothing with the tensor; of a sharded one this process's shard, still a shard.

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
    """Whether any of them is a shard of a larger one."""
    return any(isinstance(parameter, DTensor) for parameter in parameters)


def reshard(model: nn.Module) -> None:
    """Puts a model's parameters back into shards: FSDP leaves the root's whole after a forward without gradients.

    Until then `model.parameters()` are other objects than the optimizer's.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
