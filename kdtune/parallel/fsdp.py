"""Parallelize a model over the processes of a run: FSDP2, replicas of it (HSDP), or a full copy on each."""

from functools import partial

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from kdtune.constants import TP_DIM
from kdtune.distributed import Parallelism, World
from kdtune.errors import LayoutError
from kdtune.models import Transformer, adapted_linears
from kdtune.models.nf4 import is_cut_by_rows
from kdtune.parallel.activation_checkpoint import apply_activation_checkpointing
from kdtune.parallel.compile import apply_compile
from kdtune.parallel.tensor_parallel import apply_tensor_parallel, tensor_parallel_problem

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


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
