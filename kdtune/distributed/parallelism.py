"""Settings of how a model is parallelized: the sizes of the device mesh, and the settings of FSDP2."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import torch

from kdtune.constants import TP_DIM
from kdtune.distributed.world import World, is_under_torchrun, start_world, teacher_processes_problems, world_size
from kdtune.errors import ConfigError

_START_THEM = "start as many (kdtune run --nproc_per_node N RECIPE ...)"


@dataclass(frozen=True)
class Parallelism:
    """Sizes of the device mesh, whose product is the number of processes, and the settings of FSDP2.

    Args:
        dp_replicate: number of replicas of the model; the gradients are summed over them too. -1: the remaining processes.
        dp_shard: processes that shard one copy of weights, gradients and optimizer state. -1: the remaining processes.
        tp: processes that compute one batch together, each with some of the heads, of the feed-forward and of the
            vocabulary (tensor parallelism). They communicate twice per layer: keep them within one host. -1: the remaining
            processes.
        reshard_after_forward: free a layer's all-gathered weights after its forward and gather them again in backward; false
            is faster, and the full weights stay in memory between forward and backward.
        cpu_offload: shards, gradients and optimizer state lie in the CPU's memory between their uses.
        param_dtype: dtype in which FSDP2 gathers and computes with the weights; null: their own.
        reduce_dtype: dtype in which gradients are summed over processes; null: fp32, or their own if that is wider.
        timeout_minutes: a process that waits longer for the others ends the run with an error.
    """

    dp_replicate: int = 1
    dp_shard: int = -1
    tp: int = 1
    reshard_after_forward: bool = True
    cpu_offload: bool = False
    param_dtype: Literal["fp32", "bf16"] | None = None
    reduce_dtype: Literal["fp32", "bf16"] | None = None
    timeout_minutes: float = 10.0

    def sizes(self, world_size: int, *, advice: str = _START_THEM) -> dict[str, int]:
        """Return the mesh for this many processes, with -1 filled in: sizes by name, consecutive ranks in the last dimension.

        advice: how to start another number of processes, for the error.

        Raises:
            ConfigError: their product is not the number of processes.
        """
        given = {"dp_replicate": self.dp_replicate, "dp_shard": self.dp_shard, TP_DIM: self.tp}
        text = " ".join(f"{name}={size}" for name, size in given.items())
        for name, size in given.items():
            if size < 1 and size != -1:
                raise ConfigError(f"{name}={size}: must be at least 1, or -1 for the rest")
        open_names = [name for name, size in given.items() if size == -1]
        if len(open_names) > 1:
            raise ConfigError(f"{text}: only one of them may be -1, the rest")
        fixed = 1
        for size in given.values():
            fixed *= 1 if size == -1 else size
        if world_size % fixed or (not open_names and fixed != world_size):
            wanted = f"a multiple of {fixed}" if open_names else f"{fixed}"
            raise ConfigError(f"{text}: needs {wanted} processes, found {world_size}; {advice} or change the sizes")
        return {name: world_size // fixed if size == -1 else size for name, size in given.items()}

    @property
    def is_plain(self) -> bool:
        """Return whether weights stay on the device and in the dtype in which they are used."""
        return not self.cpu_offload and not self.param_dtype

    def start_world(self, device: torch.device, *, teacher_processes: int = 0) -> AbstractContextManager[World]:
        """Start the processes of this run; see `kdtune.distributed.start_world`."""
        tp = self.sizes(world_size() - teacher_processes)[TP_DIM]
        return start_world(device, tp=tp, timeout_minutes=self.timeout_minutes, teacher_processes=teacher_processes)

    def param_device(self, world: World) -> torch.device:
        """Device that holds the weights between their uses."""
        return torch.device("cpu") if self.cpu_offload else world.device

    def problems(self) -> list[str]:
        """Return problems with the settings other than the sizes, one sentence each."""
        found = [] if self.timeout_minutes > 0 else [f"timeout_minutes={self.timeout_minutes}: must be above 0"]
        if not is_under_torchrun():
            unused = [name for name in ("param_dtype", "reduce_dtype", "cpu_offload") if getattr(self, name)]
            found += [
                f"{name}={getattr(self, name)}: used under torchrun only (kdtune run --nproc_per_node N)"
                for name in unused
            ]
        return found


def parallelism_problems(
    parallelism: Parallelism | None, teacher: Parallelism | None = None, *, teacher_processes: int = 0
) -> list[str]:
    """Return why these settings do not fit the number of processes that were started, or each other, one sentence each.

    Args:
        parallelism: the model's, or the student's.
        teacher: the teacher's; None: the same as the student's.
        teacher_processes: number of the started processes that hold only the teacher.
    """
    if parallelism is None:
        return ["parallelism=null: kdtune.distributed.Parallelism expected; leave the key out for its default"]
    if problems := teacher_processes_problems(teacher_processes):
        return problems
    found = mesh_problems(parallelism, teacher, world_size(), teacher_processes=teacher_processes)
    for name, one in (("parallelism", parallelism), ("teacher_parallelism", teacher)):
        found += [f"{name}: {problem}" for problem in (one.problems() if one else [])]
    for name in ("reduce_dtype", "timeout_minutes"):
        if teacher and getattr(teacher, name) not in (getattr(Parallelism(), name), getattr(parallelism, name)):
            why = (
                "a teacher has no gradients" if name == "reduce_dtype" else "a run has one, parallelism.timeout_minutes"
            )
            found.append(f"teacher_parallelism.{name}={getattr(teacher, name)}: not used, for {why}; leave it out")
    return found


def mesh_problems(
    parallelism: Parallelism,
    teacher: Parallelism | None,
    num_processes: int,
    *,
    teacher_processes: int = 0,
    advice: str = _START_THEM,
) -> list[str]:
    """Return why these sizes do not fit the number of processes or each other, one sentence each; see `parallelism_problems`.

    parallelism: the student's. teacher: the teacher's; None: the same as the student's. num_processes: of the whole run.
    teacher_processes: number of them that hold only the teacher. advice: how to start another number of processes.
    """
    parts = {"parallelism": (parallelism, num_processes - teacher_processes)}
    if teacher or teacher_processes:
        parts["teacher_parallelism"] = (teacher or parallelism, teacher_processes or num_processes)
    sizes, found = [], []
    for name, (one, size) in parts.items():
        try:
            sizes.append(one.sizes(size, advice=advice)[TP_DIM])
        except ConfigError as error:
            found.append(f"{name}: {error}")
    if found or len(sizes) == 1:
        return found
    tp, teacher_tp = sizes
    if teacher_processes and max(tp, teacher_tp) > 1:
        return [
            f"teacher_processes={teacher_processes}: with tp={max(tp, teacher_tp)}, whose processes need the same batches; allowed "
            "is tp=1 on both sides: set it, or teacher_processes=0"
        ]
    if teacher_tp not in (1, tp):
        return [
            f"teacher_parallelism.tp={teacher_tp}: the processes of one teacher must have the same batches; allowed is 1 or the "
            f"student's, parallelism.tp={tp}"
        ]
    return []
