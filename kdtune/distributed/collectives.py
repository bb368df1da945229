"""Collective operations of the processes that read and write one model; the identity for a single process.

Rank 0 names and renames folders and writes what is not sharded. All processes call the same functions in the same order.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import distributed as dist
from torch.distributed import ProcessGroup

from kdtune.errors import KDTuneError

T = TypeVar("T")


def is_distributed() -> bool:
    """Return whether this process is in a process group, even a group of one."""
    return dist.is_available() and dist.is_initialized()


def is_rank_zero() -> bool:
    """Return whether this process is rank 0 of the default process group: it broadcasts, and writes what is not sharded.

    What a run prints and shows is the main process's, see `World.is_main`: a teacher's process group has none.
    """
    return not is_distributed() or dist.get_rank() == 0


def barrier() -> None:
    """Wait for all processes (barrier)."""
    if is_distributed():
        dist.barrier()


@contextmanager
def raise_on_all_ranks(group: ProcessGroup | None = None) -> Iterator[None]:
    """A block that ends on all processes together; a KDTuneError in one of them is raised on all.

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
    """Return a group of all processes for a background thread, separate from training's messages; None for one process.

    Called by all processes. It has the timeout of the run's own group.
    """
    if not is_distributed():
        return None
    run_group = dist.distributed_c10d._get_default_group()
    timeout = run_group._get_backend(torch.device("cpu")).options._timeout
    group: ProcessGroup = dist.new_group(backend="gloo", timeout=timeout)
    return group


def broadcast_object(value: T, group: ProcessGroup | None = None) -> T:
    """Broadcast rank 0's value to every process. It is pickled; the processes trust each other."""
    if not is_distributed():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group, device=torch.device("cpu"))
    return box[0]
