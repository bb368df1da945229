"""Point-to-point channel between the student's processes and those that hold only the teacher.

Each side is a complete world with its own default process group; they communicate only here. The S student ranks come
first, the T teacher ranks last. Each student rank has fixed peers among the teacher's ranks, and vice versa: with S >= T
teacher rank t serves the students t, t + T, ...; with S < T the rows of student rank s are split over the teacher ranks
s, s + S, ....
"""

import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from kdtune.errors import TrainingError

END = 0
"""The tag by which a student rank says that it will request nothing more."""
_DTYPES = (torch.int64, torch.float32, torch.bfloat16, torch.float64, torch.float16)
# tag, dtype, whether it comes by way of the GPUs, number of dimensions, their lengths
_MAX_DIMENSIONS = 3
_HEADER_LENGTH = 4 + _MAX_DIMENSIONS

# Long enough for a peer that is receiving; short, for one that is busy.
_FAIL_TIMEOUT = timedelta(seconds=5)


@dataclass(frozen=True)
class PendingSend:
    """A pending send; it keeps the tensors, which must not be changed before they have arrived."""

    channel: "Channel"
    rank: int
    works: tuple[Any, ...]
    tensors: tuple[Tensor, ...]

    def wait(self, timeout: timedelta | None = None) -> None:
        """Wait for its arrival, up to this time or the run's timeout; TrainingError if the peer does not receive it."""
        with self.channel.naming_peer(self.rank):
            for work in self.works:
                work.wait(timeout) if timeout else work.wait()


@dataclass(frozen=True)
class Channel:
    """This process's end of the connections between the two sides."""

    rank: int
    """Rank of this process among all of the run, including the teacher's."""
    num_students: int
    num_teachers: int
    device: torch.device
    """Device that receives tensors which are not on the CPU."""
    control: Any
    """ProcessGroupGloo."""
    data: Any
    """ProcessGroupNCCL on CUDA; None: GPU tensors are copied through the CPU."""

    @property
    def num_processes(self) -> int:
        """Number of all processes of the run."""
        return self.num_students + self.num_teachers

    @property
    def is_teacher(self) -> bool:
        """Return whether this process holds only the teacher."""
        return self.rank >= self.num_students

    @property
    def peers(self) -> range:
        """The peers of this process: ranks, among all, of the other side; at least one."""
        if self.is_teacher:
            return range((self.rank - self.num_students) % self.num_students, self.num_students, self.num_teachers)
        return range(self.num_students + self.rank % self.num_teachers, self.num_processes, self.num_students)

    @property
    def rounds(self) -> int:
        """Return the largest number of peers of any teacher rank: all teacher ranks run that many forwards when every
        student asks once.
        """
        return -(-self.num_students // self.num_teachers)

    def send(self, rank: int, tag: int, tensor: Tensor | None = None) -> PendingSend:
        """Send a tag (0 or more) and optionally a tensor of up to three dimensions, without waiting for them."""
        header = torch.zeros(_HEADER_LENGTH, dtype=torch.int64)
        header[0] = tag
        groups, tensors = [self.control], [header]
        if tensor is not None:
            on_gpu = self.data is not None and tensor.is_cuda
            tensor = tensor.contiguous() if on_gpu else tensor.contiguous().cpu()
            description = [_DTYPES.index(tensor.dtype), int(on_gpu), tensor.ndim, *tensor.shape]
            header[1 : 1 + len(description)] = torch.tensor(description)
            if tensor.numel():
                groups.append(self.data if on_gpu else self.control)
                tensors.append(tensor)
        with self.naming_peer(rank):
            works = tuple(group.send([one], rank, 0) for group, one in zip(groups, tensors, strict=True))
        return PendingSend(self, rank, works, tuple(tensors))

    def receive(self, rank: int) -> tuple[int, Tensor]:
        """Receive the next tag and tensor from this process; an empty tensor if it sent only the tag.

        TrainingError if it is gone, has sent nothing before the timeout, or has failed; the error then has its exit
        code.
        """
        header = torch.zeros(_HEADER_LENGTH, dtype=torch.int64)
        with self.naming_peer(rank):
            self.control.recv([header], rank, 0).wait()
        tag, dtype, on_gpu, num_dimensions, *lengths = header.tolist()
        if tag < 0:
            raise self._peer_error(rank, "has ended with an error of its own", exit_code=-tag)
        shape = lengths[:num_dimensions] if num_dimensions else [0]
        tensor = torch.empty(shape, dtype=_DTYPES[dtype], device=self.device if on_gpu else "cpu")
        if tensor.numel():
            with self.naming_peer(rank):
                (self.data if on_gpu else self.control).recv([tensor], rank, 0).wait()
        return tag, tensor

    def close(self) -> None:
        """Close the channel: the student's processes announce the end, and the teacher's wait for it."""
        if not self.is_teacher:
            for sent in [self.send(rank, END) for rank in self.peers]:
                sent.wait()
        if self.data is not None:
            self.data.shutdown()

    def fail(self, exit_code: int) -> None:
        """Tell the waiting peers that this process ends with a user's error, so that they end with the same exit code."""
        for rank in self.peers:
            with suppress(TrainingError):  # a peer that is gone or busy finds out by itself
                self.send(rank, -exit_code).wait(_FAIL_TIMEOUT)

    @contextmanager
    def naming_peer(self, rank: int) -> Iterator[None]:
        """Turn torch's errors about a broken connection into one that names the process at its other end."""
        try:
            yield
        except RuntimeError as error:
            reason = str(error).partition("\n")[0].partition(". ")[0]
            what = f"is gone or has kept this one waiting for longer than parallelism.timeout_minutes ({reason})"
            raise self._peer_error(rank, what) from error

    def _peer_error(self, rank: int, what: str, *, exit_code: int = 1) -> TrainingError:
        whose = "student" if self.is_teacher else "teacher"
        host = socket.gethostname()
        error = TrainingError(
            f"on {host}: rank {rank}, a process of the {whose}, {what}; look for its error in the output"
        )
        error.exit_code = exit_code
        return error


def start_two_worlds(
    store: Store, rank: int, size: int, num_teachers: int, *, backend: str, device: torch.device, timeout: timedelta
) -> Channel:
    """Start the default process group (of `backend`) of this process's side, and the channel to the other side.

    `store`, `rank` and `size` are of all processes, of which the last `num_teachers`, at least one and not all, hold
    the teacher. This one computes on `device`; one that waits for another for longer than `timeout` ends with an error.
    """
    num_students = size - num_teachers
    name, first, own_size = (
        ("student", 0, num_students) if rank < num_students else ("teacher", num_students, num_teachers)
    )
    dist.init_process_group(
        backend, store=PrefixStore(name, store), rank=rank - first, world_size=own_size, timeout=timeout
    )
    control = dist.ProcessGroupGloo(PrefixStore("channel", store), rank, size, timeout)
    data = None
    if device.type == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        options.global_ranks_in_group = list(range(size))
        data = dist.ProcessGroupNCCL(PrefixStore("channel_nccl", store), rank, size, options)
    return Channel(rank, num_students, num_teachers, device, control, data)
