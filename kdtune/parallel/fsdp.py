"""Parallelize a model over the processes of a run: FSDP2, replicas of it (HSDP), or a full copy on each."""

from functools import partial

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from kdtune.constants import TP_DIM
from kdtune.distributed import Parallelism, World
from kdtune.errors import ParallelismError
from kdtune.models import Transformer, adapted_linears
from kdtune.models.nf4 import is_cut_by_rows
from kdtune.parallel.tensor_parallel import apply_tensor_parallel, tensor_parallel_problem

WHOLE_COPIES = (
    "allowed is a copy on every process: dp_shard=1 dp_replicate=-1 tp=1, without cpu_offload and param_dtype"
)

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def shard_model(model: Transformer, parallelism: Parallelism, world: World) -> Transformer:
    """Shard a model that exists, in place; `build_model` builds one whose shards are placed before its weights are read."""
    mesh = device_mesh(model, parallelism, world)
    apply_tensor_parallel(model, mesh)
    apply_fsdp(model, mesh, parallelism)
    return model


def device_mesh(model: Transformer, parallelism: Parallelism, world: World) -> DeviceMesh | None:
    """Return the mesh over which the model is sharded: the sizes of `parallelism`, with the world's timeout.

    None: every process holds all of it. So do a process without a process group, and replicas without gradients (dp_shard
    1, several processes).

    Raises:
        ConfigError: the sizes do not fit the number of processes.
        ParallelismError: they do not fit the model.
    """
    sizes = parallelism.sizes(world.size)
    if not world.has_group or (sizes[TP_DIM] == 1 and _is_copy(model, parallelism, sizes["dp_shard"])):
        return None
    # Before any communication: all processes have to get this far.
    if problem := model_problem(model, parallelism, world.size):
        raise ParallelismError(f"parallelism: {problem}")
    sizes = {name: size for name, size in sizes.items() if size > 1 or name == "dp_shard"}
    mesh = init_device_mesh(world.device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    if world.timeout is not None:
        # A dimension that is not all processes is a new group, which has torch's half an hour unless told otherwise.
        for name in sizes:
            dist.distributed_c10d._set_pg_timeout(world.timeout, mesh.get_group(name))
    return mesh


def apply_fsdp(model: Transformer, mesh: DeviceMesh | None, parallelism: Parallelism) -> None:
    """Make each layer, and the rest (embeddings, norm, head), an FSDP2 unit on the mesh's data-parallel dimensions, in place.

    Gradients become the **sum** over the processes, so that a loss divided by the tokens of all of them needs no further
    factor. The last unit stays unsharded between forward and backward: the loss reads the head outside of the model's
    forward. Replicas without gradients stay as they are, and so does everything without a mesh.

    Of an NF4 base (QLoRA), a weight whose rows `dp_shard` does not divide evenly is replicated on every process.
    """
    if mesh is None or _is_copy(model, parallelism, mesh["dp_shard"].size()):
        return
    shards = mesh["dp_shard"].size()
    quantized = {linear.weight for linear in adapted_linears(model).values() if linear.quantize_base}
    # A single shard is not sharded: FSDP2 (torch 2.13) would gather it by operations that torchao's NF4 lacks.
    copies = {weight for weight in quantized if shards == 1 or not is_cut_by_rows(weight.shape, shards)}
    offload = parallelism.cpu_offload and mesh.device_type != "cpu"
    shard_unit = partial(
        fully_shard,
        mesh=mesh[tuple(name for name in mesh.mesh_dim_names or () if name != TP_DIM)],
        mp_policy=_mixed_precision(model, parallelism),
        offload_policy=CPUOffloadPolicy() if offload else OffloadPolicy(),
        ignored_params=copies,
    )
    for layer in model.layers:
        shard_unit(layer, reshard_after_forward=parallelism.reshard_after_forward)
    shard_unit(model, reshard_after_forward=False)
    _sum_gradients(model)


def is_whole(parallelism: Parallelism, num_processes: int) -> bool:
    """Return whether each of the processes holds all of a frozen model, as quantized weights must be."""
    sizes = parallelism.sizes(num_processes)
    return sizes[TP_DIM] == sizes["dp_shard"] == 1 and parallelism.is_plain


def _is_copy(model: Transformer, parallelism: Parallelism, num_shards: int) -> bool:
    """Return whether FSDP has nothing to do: no shards, no gradients to sum, weights used where and as they are stored."""
    is_trained = any(parameter.requires_grad for parameter in model.parameters())
    return num_shards == 1 and not is_trained and parallelism.is_plain


def model_problem(model: Transformer, parallelism: Parallelism, num_processes: int) -> str | None:
    """Return why a model cannot be divided among this many processes by `tp` or `cpu_offload`, None if it can; no weights are needed."""
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
