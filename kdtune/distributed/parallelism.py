"""Parallelize a model over the processes of a run: FSDP2, replicas of it (HSDP), or a full copy on each."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from kdtune.config import instantiate
from kdtune.constants import TP_DIM
from kdtune.distributed.activation_checkpoint import apply_activation_checkpointing
from kdtune.distributed.compile import apply_compile
from kdtune.distributed.tensor_parallel import apply_tensor_parallel, tensor_parallel_problem
from kdtune.distributed.world import World, is_under_torchrun, start_world, teacher_processes_problems, world_size
from kdtune.errors import ConfigError, LayoutError
from kdtune.models import Transformer, adapted_linears
from kdtune.models.nf4 import is_cut_by_rows

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
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

    def home(self, world: World) -> torch.device:
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


def parallelize(
    model: Transformer,
    parallelism: Parallelism,
    world: World,
    *,
    compile: bool = False,
    activation_checkpointing: bool = False,
) -> Transformer:
    """Prepare the model for a run, in place: activation checkpointing, then torch.compile, then sharding (`shard_model`).

    parallelism: how to distribute the model over the world's processes. compile: compile each layer.
    activation_checkpointing: recompute activations in backward.
    """
    if activation_checkpointing:
        apply_activation_checkpointing(model)
    if compile:
        # For tensor-parallel layers, torch 2.13's compiler recurses endlessly with symbolic lengths.
        apply_compile(model, dynamic=parallelism.sizes(world.size)[TP_DIM] == 1)
    return shard_model(model, parallelism, world)


def shard_model(model: Transformer, parallelism: Parallelism, world: World) -> Transformer:
    """Shard the model: first over `tp` processes, then each layer, and the rest (embeddings, norm, head), as an FSDP2 unit.

    `parallelism` has the sizes, `world` the processes.
    Gradients become the **sum** over the processes, so that a loss divided by the tokens of all of them needs no further
    factor. The last unit stays unsharded between forward and backward: the loss reads the head outside of the model's
    forward. Nothing is done without a process group, or for replicas without gradients (dp_shard 1, several processes).

    Of an NF4 base (QLoRA), a weight whose rows `dp_shard` does not divide evenly is replicated on every process.

    Raises:
        ConfigError: the sizes do not fit the number of processes.
        LayoutError: they do not fit the model.
    """
    sizes = parallelism.sizes(world.size)
    if not dist.is_initialized():
        return model
    trained = any(parameter.requires_grad for parameter in model.parameters())
    is_copy = sizes["dp_shard"] == 1 and not trained and parallelism.is_plain
    if is_copy and sizes[TP_DIM] == 1:
        return model
    # Before any communication: all processes have to get this far.
    if problem := model_problem(model, parallelism, world.size):
        raise LayoutError(f"parallelism: {problem}")
    quantized = {linear.weight for linear in adapted_linears(model).values() if linear.quantize_base}
    # A single shard is not sharded: FSDP2 (torch 2.13) would gather it by operations that torchao's NF4 lacks.
    shards = sizes["dp_shard"]
    copies = {weight for weight in quantized if shards == 1 or not is_cut_by_rows(weight.shape, shards)}
    sizes = {name: size for name, size in sizes.items() if size > 1 or name == "dp_shard"}
    mesh = _mesh(world, sizes)
    if TP_DIM in sizes:
        apply_tensor_parallel(model, mesh[TP_DIM])
    if is_copy:
        return model
    offload = parallelism.cpu_offload and world.device.type != "cpu"
    shard_unit = partial(
        fully_shard,
        mesh=mesh[tuple(name for name in sizes if name != TP_DIM)],
        mp_policy=_mixed_precision(model, parallelism),
        offload_policy=CPUOffloadPolicy() if offload else OffloadPolicy(),
        ignored_params=copies,
    )
    for layer in model.layers:
        shard_unit(layer, reshard_after_forward=parallelism.reshard_after_forward)
    shard_unit(model, reshard_after_forward=False)
    _sum_gradients(model)
    return model


def model_problem(model: Transformer, parallelism: Parallelism, num_processes: int) -> str | None:
    """Return why a model cannot be spread over this many processes by `tp` or `cpu_offload`, None if it can; no weights are needed."""
    tp = parallelism.sizes(num_processes)[TP_DIM]
    if problem := tensor_parallel_problem(model.config, tp):
        return problem
    is_quantized = any(linear.quantize_base for linear in adapted_linears(model).values())
    if is_quantized and (tp > 1 or parallelism.cpu_offload):
        return (
            f"tp={tp}, cpu_offload={str(parallelism.cpu_offload).lower()}, with adapters of quantize_base=true (QLoRA); an NF4 "
            "base is cut by rows for FSDP alone, and stays on the device: allowed are tp=1 and cpu_offload=false; or set "
            "quantize_base=false"
        )
    return None


def _mesh(world: World, sizes: dict[str, int]) -> DeviceMesh:
    """Return the device mesh of these sizes over the world's processes, with the world's timeout."""
    mesh = init_device_mesh(world.device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    if world.timeout is not None:
        # A dimension that is not all processes is a new group, which has torch's half an hour unless told otherwise.
        for name in sizes:
            dist.distributed_c10d._set_pg_timeout(world.timeout, mesh.get_group(name))
    return mesh


def _sum_gradients(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # FSDP2 divides by the number of processes unless told not to; a factor alone is refused by gloo.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _mixed_precision(model: nn.Module, parallelism: Parallelism) -> MixedPrecisionPolicy:
    stored = next(parameter for parameter in model.parameters() if parameter.is_floating_point()).dtype
    reduce_dtype = (
        _DTYPES[parallelism.reduce_dtype] if parallelism.reduce_dtype else torch.promote_types(stored, torch.float32)
    )
    param_dtype = _DTYPES[parallelism.param_dtype] if parallelism.param_dtype else None
    return MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype)


def parallelism_problems(node: Any, teacher_node: Any = None, *, teacher_processes: int = 0) -> list[str]:
    """Return why these config nodes do not fit the number of processes, or each other, one sentence each.

    Args:
        node: the model's, or the student's.
        teacher_node: the teacher's; None: the same as the student's.
        teacher_processes: number of the started processes that hold only the teacher.
    """
    parallelism, teacher = instantiate(node), instantiate(teacher_node)
    if parallelism is None:
        return ["parallelism=null: kdtune.distributed.Parallelism expected; leave the key out for its default"]
    if problems := teacher_processes_problems(teacher_processes):
        return problems
    found = layout_problems(parallelism, teacher, world_size(), teacher_processes=teacher_processes)
    for name, one in (("parallelism", parallelism), ("teacher_parallelism", teacher)):
        found += [f"{name}: {problem}" for problem in (one.problems() if one else [])]
    for name in ("reduce_dtype", "timeout_minutes"):
        if teacher and getattr(teacher, name) not in (getattr(Parallelism(), name), getattr(parallelism, name)):
            why = (
                "a teacher has no gradients" if name == "reduce_dtype" else "a run has one, parallelism.timeout_minutes"
            )
            found.append(f"teacher_parallelism.{name}={getattr(teacher, name)}: not used, for {why}; leave it out")
    return found


def layout_problems(
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
