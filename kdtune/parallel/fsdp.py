"""Parallelize a model over the processes of a run: FSDP2, replicas of it (HSDP), or a full copy on each."""

from functools import partial

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from kdtune.constants import TP_DIM
from kdtune.distributed import Parallelism, World
from kdtune.models import Transformer, adapted_linears
from kdtune.models.nf4 import is_cut_by_rows
from kdtune.parallel.mesh import device_mesh, is_copy
from kdtune.parallel.tensor_parallel import apply_tensor_parallel

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def shard_model(model: Transformer, parallelism: Parallelism, world: World) -> Transformer:
    """Shard a model that exists, in place; `build_model` builds one whose shards are placed before its weights are read."""
    mesh = device_mesh(model, parallelism, world)
    apply_tensor_parallel(model, mesh)
    apply_fsdp(model, mesh, parallelism)
    return model


def apply_fsdp(model: Transformer, mesh: DeviceMesh | None, parallelism: Parallelism) -> None:
    """Make each layer, and the rest (embeddings, norm, head), an FSDP2 unit on the mesh's data-parallel dimensions, in place.

    Gradients become the **sum** over the processes, so that a loss divided by the tokens of all of them needs no further
    factor. The last unit stays unsharded between forward and backward: the loss reads the head outside of the model's
    forward. Replicas without gradients stay as they are, and so does everything without a mesh.

    Of an NF4 base (QLoRA), a weight whose rows `dp_shard` does not divide evenly is replicated on every process.
    """
    if mesh is None or is_copy(model, parallelism, mesh["dp_shard"].size()):
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
