"""The processes of a run: their ranks, their number, and sums over all of them."""

import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed as dist
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from kdtune.distributed.allocator import keep_few_kernels, keep_freed_memory
from kdtune.distributed.channel import Channel, start_two_worlds
from kdtune.distributed.collectives import broadcast_object
from kdtune.errors import KDTuneError

T = TypeVar("T")

# Longer than the processes of a run are apart from each other while they start, and short where only one has found a mistake.
_EXIT_TIMEOUT_SECONDS = 5
_SEND_RELEASE_SECONDS = 0.2


@dataclass(frozen=True)
class World:
    """The processes of a run, as this one sees them. A single process is a world of one, in which every sum is the identity."""

    device: torch.device
    """Device that this process computes on."""
    rank: int = 0
    """Rank of this process, from 0."""
    size: int = 1
    """Number of processes of this world."""
    tp: int = 1
    """Number of consecutive processes that compute the same batches together (tensor parallelism)."""
    timeout: timedelta | None = None
    """Timeout of a process that waits for the others; None: torch's default."""
    channel: Channel | None = None
    """Channel between the student's world and the teacher's; None: one world holds both."""

    @property
    def dp_rank(self) -> int:
        """Index of this process's share of the data, from 0."""
        return self.rank // self.tp

    @property
    def dp_size(self) -> int:
        """Number of shares of the data."""
        return self.size // self.tp

    @property
    def is_main(self) -> bool:
        """Return whether this process writes, prints and shows progress: rank 0, unless it holds only the teacher."""
        return self.rank == 0 and not self.is_teacher

    @property
    def is_teacher(self) -> bool:
        """Return whether this process holds only the teacher."""
        return self.channel is not None and self.channel.is_teacher

    @property
    def has_group(self) -> bool:
        """Return whether these processes communicate: they are the default process group, which may be of one process."""
        return dist.is_initialized() and dist.get_world_size() == self.size

    def print(self, text: str) -> None:
        """Print once, not on every process."""
        if self.is_main:
            print(text)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sum the values over all shares of the data, in float64; every process calls it with the same number of values."""
        # Ranks that share their data have the same values: one of them counts.
        return self._sum_all(values if self.rank % self.tp == 0 else [0.0] * len(values))

    def any(self, flag: bool) -> bool:
        """Return whether it is true on any process."""
        return self._sum_all([float(flag)])[0] > 0

    def sum_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return the sum over all shares of the data of the gradient of a parameter that every process holds whole."""
        if self.size == 1:
            return gradient
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient / self.tp  # processes that share their data have the same

    def _sum_all(self, values: Sequence[float]) -> list[float]:
        if self.size == 1 or not values:
            return list(values)
        # Metal has no float64, and numbers of a few bytes gain nothing from a GPU: they go by way of the CPU's group.
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor)
        return list(tensor.tolist())

    def gather(self, value: T) -> list[T]:
        """Gather every process's value, in the order of their ranks. It is pickled; the processes trust each other."""
        if self.size == 1:
            return [value]
        values = [value] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: T) -> T:
        """Return rank 0's value on every process. It is pickled; the processes trust each other."""
        return value if self.size == 1 else broadcast_object(value)

    @contextmanager
    def rank0_stderr(self) -> Iterator[None]:
        """A context in which only rank 0's output on stderr is seen, such as a library's progress bars."""
        if self.is_main:
            yield
            return
        with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
            yield


SINGLE_PROCESS = World(torch.device("cpu"))
"""A process without others: the default where a world says only who shares the work."""


@contextmanager
def start_world(
    device: torch.device, *, tp: int = 1, timeout_minutes: float = 10.0, teacher_processes: int = 0
) -> Iterator[World]:
    """Start the world of this run: the processes that torchrun has started, or this process alone.

    Args:
        device: device to compute on; with several processes, each takes the CUDA device of its local rank.
        tp: number of consecutive processes that get the same data.
        timeout_minutes: a process that waits longer for the others ends with an error.
        teacher_processes: number of torchrun's processes, the last ones, that form a world of their own for the teacher, with
            a channel to the world of the others.

    On a CPU, the process keeps the memory that it frees (`keep_freed_memory`), and few of oneDNN's kernels (`keep_few_kernels`). An
    error that ends the block is printed with rank and host, so that the root cause can be found in the combined output.
    """
    if device.type == "cpu":
        keep_freed_memory()
        keep_few_kernels()
    if not is_under_torchrun():
        yield World(device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout, channel = timedelta(minutes=timeout_minutes), None
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    if teacher_processes:
        channel = start_two_worlds(
            store, rank, size, teacher_processes, backend=backend, device=device, timeout=timeout
        )
    else:
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    try:
        yield World(device, dist.get_rank(), dist.get_world_size(), tp, timeout, channel)
        if channel is not None:
            channel.close()
    except Exception as error:
        if not isinstance(error, KDTuneError):
            print(f"[rank {rank} on {socket.gethostname()}] {type(error).__name__}:", file=sys.stderr, flush=True)
        else:
            if channel is not None:
                channel.fail(error.exit_code)
            _exit_together(store, rank, size, error)
            _release_sends()
        raise
    dist.destroy_process_group()
    _release_sends()


def _release_sends() -> None:
    """Wait for gloo's threads to release the last tensors sent, for which they need the interpreter.

    A thread that needs it while the interpreter shuts down aborts the process (torch 2.13,
    https://github.com/pytorch/pytorch/pull/179291): of six processes on two cores, nearly always one did.
    """
    time.sleep(_SEND_RELEASE_SECONDS)


def _exit_together(store: Store, rank: int, size: int, error: KDTuneError) -> None:
    """Wait until all processes have come here, or for a few seconds.

    A user's mistake is found by all processes. One that left at once would break connections that the others still need to
    get here, and they would end with a traceback. Only a host's first process prints the error.
    """
    first = rank - int(os.environ.get("LOCAL_RANK", "0"))
    with suppress(RuntimeError):  # the process that holds the store has left, as it found all of them here
        store.set(f"mistake of {rank}", str(error))
        if _all_arrived(store, "mistaken", size):
            error.is_repeated = rank != first and store.get(f"mistake of {first}") == str(error).encode()
            _all_arrived(store, "leaving", size)


def _all_arrived(store: Store, place: str, size: int) -> bool:
    """Return whether all processes have called this with the same place within a few seconds."""
    give_up = time.monotonic() + _EXIT_TIMEOUT_SECONDS
    store.add(place, 1)
    while (arrived := store.add(place, 0)) < size and time.monotonic() < give_up:
        time.sleep(0.02)
    return arrived == size


def is_under_torchrun() -> bool:
    """Return whether torchrun, or a launcher that sets the same environment, has started this process."""
    return "RANK" in os.environ


def is_first_on_host() -> bool:
    """Return whether this is the first process of its host, or a single process."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def world_size() -> int:
    """Return the number of processes that torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def teacher_processes_problems(teacher_processes: int) -> list[str]:
    """Return why this many processes cannot be reserved for the teacher, one sentence each."""
    if 0 <= teacher_processes < world_size():
        return []
    found = f"found {world_size()}" if is_under_torchrun() else "found no torchrun option"
    return [
        f"teacher_processes={teacher_processes}: needs more processes than that, for the student, {found}; start them "
        "(kdtune run --nproc_per_node N RECIPE ...), or set 0: every process holds its part of both models"
    ]


@contextmanager
def fake_world(size: int, rank: int = 0) -> Iterator[World]:
    """A context with the world that rank `rank` of `size` would see. Collectives return at once; their results are meaningless.

    For models on the meta device. No process group may exist before, and none exists afterwards.
    """
    # Half a second of imports, which no run needs. The first is torch's own, with which it tests its sharding.
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield World(torch.device("cpu"), rank, size)
    finally:
        dist.destroy_process_group()
        # DTensor remembers meshes: a later one of the same shape would get this one's groups.
        _clear_sharding_prop_cache()
