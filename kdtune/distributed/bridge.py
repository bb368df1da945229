"""Between the processes of the student and those that hold the teacher alone: tensors from one process to another.

Each side is a complete world, with a default process group of its own; they meet here only. S processes of the student
come first, T of the teacher are the last. Every student's process has its own ones of the teacher, and the other way round:
with S >= T a teacher's process serves the students t, t + T, ...; with S < T a student's rows are shared by the teacher's
processes s, s + S, ....
"""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from kdtune.errors import TrainingError

END = 0
"""The note by which a process of the student says that it asks for nothing more."""
_DTYPES = (torch.int64, torch.float32, torch.bfloat16, torch.float64, torch.float16)
# note, dtype, whether it comes by way of the GPUs, number of dimensions, their lengths
_MAX_DIMENSIONS = 3
_HEADER_LENGTH = 4 + _MAX_DIMENSIONS

Delivered = Callable[[], None]
"""Returns once the other process has what was sent to it."""


@dataclass(frozen=True)
class Bridge:
    """This process's end of the connections between the two sides."""

    rank: int
    """This process among all of the run, the teacher's included."""
    num_students: int
    num_teachers: int
    device: torch.device
    """Where tensors that do not lie on the CPU are received."""
    control: Any
    """ProcessGroupGloo."""
    data: Any
    """ProcessGroupNCCL on CUDA; None: what lies on a GPU goes by way of the CPU."""

    @property
    def num_processes(self) -> int:
        """All of the run."""
        return self.num_students + self.num_teachers

    @property
    def is_teacher(self) -> bool:
        """Whether this process holds the teacher, and nothing of the student."""
        return self.rank >= self.num_students

    @property
    def partners(self) -> range:
        """The ranks, among all, of the processes of the other side that this one speaks with; at least one."""
        if self.is_teacher:
            return range((self.rank - self.num_students) % self.num_students, self.num_students, self.num_teachers)
        return range(self.num_students + self.rank % self.num_teachers, self.num_processes, self.num_students)

    @property
    def turns(self) -> int:
        """The most partners that any process of the teacher has: so often do all of them compute when every student asks once."""
        return -(-self.num_students // self.num_teachers)

    def send(self, rank: int, note: int, tensor: Tensor | None = None) -> Delivered:
        """Sends a number and, where there is one, a tensor of up to three dimensions; does not wait.

        What is returned must be called once: until then it keeps the tensor, which must not be changed.
        """
        header = torch.zeros(_HEADER_LENGTH, dtype=torch.int64)
        header[0] = note
        works = []
        with self._with(rank):
            if tensor is not None:
                on_gpu = self.data is not None and tensor.is_cuda
                tensor = tensor.contiguous() if on_gpu else tensor.contiguous().cpu()
                description = [_DTYPES.index(tensor.dtype), int(on_gpu), tensor.ndim, *tensor.shape]
                header[1 : 1 + len(description)] = torch.tensor(description)
            works.append(self.control.send([header], rank, 0))
            if tensor is not None and tensor.numel():
                works.append((self.data if tensor.is_cuda else self.control).send([tensor], rank, 0))

        def wait(_keep: tuple[Tensor | None, ...] = (header, tensor)) -> None:
            with self._with(rank):
                for work in works:
                    work.wait()

        return wait

    def receive(self, rank: int) -> tuple[int, Tensor]:
        """The next number and tensor that this process has sent; an empty tensor where it sent the number alone.

        Raises:
            TrainingError: it is gone, or has sent nothing before the timeout.
        """
        header = torch.zeros(_HEADER_LENGTH, dtype=torch.int64)
        with self._with(rank):
            self.control.recv([header], rank, 0).wait()
            note, dtype, on_gpu, num_dimensions, *lengths = header.tolist()
            shape = lengths[:num_dimensions] if num_dimensions else [0]
            tensor = torch.empty(shape, dtype=_DTYPES[dtype], device=self.device if on_gpu else "cpu")
            if tensor.numel():
                (self.data if on_gpu else self.control).recv([tensor], rank, 0).wait()
        return note, tensor

    def close(self) -> None:
        """Ends the conversation: the student's processes say so, and the teacher's, which wait for that, have heard it."""
        if not self.is_teacher:
            for delivered in [self.send(rank, END) for rank in self.partners]:
                delivered()
        if self.data is not None:
            self.data.shutdown()

    @contextmanager
    def _with(self, rank: int) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            who = "the student" if self.is_teacher else "the teacher"
            reason = str(error).partition("\n")[0]
            raise TrainingError(
                f"on {socket.gethostname()}: rank {rank}, a process of {who}, is gone or has kept this one waiting for longer "
                f"than parallelism.timeout_minutes ({reason}); look for its own error in the output"
            ) from error


def start_two_worlds(backend: str, device: torch.device, timeout: timedelta, num_teachers: int) -> Bridge:
    """The default process group of this process's side, and the connections to the other.

    Args:
        backend: of the side's process group.
        device: where this process computes.
        timeout: a process that waits longer for another one ends with an error.
        num_teachers: the last processes that torchrun has started hold the teacher; at least one, and not all.
    """
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    num_students = size - num_teachers
    name, first, own_size = (
        ("student", 0, num_students) if rank < num_students else ("teacher", num_students, num_teachers)
    )
    dist.init_process_group(
        backend, store=PrefixStore(name, store), rank=rank - first, world_size=own_size, timeout=timeout
    )
    control = dist.ProcessGroupGloo(PrefixStore("bridge", store), rank, size, timeout)
    data = None
    if device.type == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        options.global_ranks_in_group = list(range(size))
        data = dist.ProcessGroupNCCL(PrefixStore("bridge_nccl", store), rank, size, options)
    return Bridge(rank, num_students, num_teachers, device, control, data)
