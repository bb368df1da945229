"""Build a model for a run: from builder and checkpoint to weights on the devices of its processes."""

import os
from pathlib import Path

import torch
from torch import nn

from kdtune.checkpoint import Checkpointer, is_adapter_folder, load_adapter
from kdtune.constants import TP_DIM
from kdtune.distributed import SINGLE_PROCESS, Parallelism, World
from kdtune.errors import CheckpointError, ConfigError, ParallelismError
from kdtune.models import Transformer, TransformerConfig, has_adapters, on_meta_device
from kdtune.models.float8 import Float8Recipe, apply_float8
from kdtune.models.quantization import quantize
from kdtune.parallel.activations import (
    Checkpointed,
    apply_activation_checkpointing,
    apply_activation_offloading,
)
from kdtune.parallel.mesh import WHOLE_COPIES, device_mesh
from kdtune.parallel.meta import Adapter, Builder, add_adapters, initial_model, model_config


def build_model(
    builder: Builder | None,
    checkpointer: Checkpointer | None,
    *,
    dtype: torch.dtype | None,
    world: World = SINGLE_PROCESS,
    parallelism: Parallelism | None = None,
    adapter: Adapter | None = None,
    weights: Path | None = None,
    trainable: bool = True,
    quantization: str | None = None,
    float8_training: Float8Recipe | None = None,
    activation_checkpointing: Checkpointed | None = None,
    activation_offloading: bool = False,
    compile: bool = False,
) -> Transformer:
    """Build the model of a run, sharded over its processes: each shard is placed before its weights are read.

    Without a checkpointer the weights are random: drawn in fp32 from torch's seed before they are sharded, so all processes
    draw the same.

    Args:
        builder: makes the model, which must agree with the checkpoint; None: made from the checkpoint's own config.
        checkpointer: reads the weights; None: random weights.
        dtype: dtype of the weights; None: as stored, for a model that is not sharded.
        world: the processes, with the device of this one.
        parallelism: how it is divided among them; None: the default, sharded over all of them.
        adapter: called with the model as `model`, adds adapters, such as `kdtune.models.apply_lora`; None: no adapters except
            those that the builder makes.
        weights: a folder that replaces the checkpointer's, such as the step folder a run is resumed from. If it holds an
            adapter, the base still comes from the checkpointer and the adapter from here.
        trainable: False freezes all parameters.
        quantization: scheme of `kdtune.models.quantization` for the linears of a frozen model's layers, which are quantized one
            by one as they are read; every process holds them all. None: the weights stay as they are.
        float8_training: recipe of the layers' matrix products in float8, see `kdtune.models.float8`; None: in the weights' dtype.
        activation_checkpointing: recompute activations in backward, see `apply_activation_checkpointing`; None: keep them.
        activation_offloading: keep them in the CPU's memory, see `apply_activation_offloading`.
        compile: torch.compile each layer.

    Raises:
        ConfigError: with neither a builder nor a checkpointer, or where the adapter or float8_training does not fit the model, or
            the sizes of the parallelism the number of processes.
        ParallelismError: the parallelism does not fit the model, or divides quantized weights.
        CheckpointError: the files cannot be read or do not fit the builder or the adapter.
    """
    resumed = weights if weights is not None and is_adapter_folder(weights) else None
    source = checkpointer
    if weights is not None and not resumed:
        source = Checkpointer(weights, family=getattr(checkpointer, "family", None))
    parallelism = parallelism or Parallelism()
    device = parallelism.param_device(world)
    if source is None:
        _check_room(builder, device)

    with device if source is None else on_meta_device():
        model = initial_model(builder, source).to(dtype)
        model = add_adapters(model, adapter)
    if weights is not None and not resumed and has_adapters(model):
        raise CheckpointError(f"{weights}: holds a whole model, an adapter expected: the run is to train an adapter")
    if not trainable:
        model.requires_grad_(False)
    if float8_training:
        apply_float8(model, float8_training)

    mesh = device_mesh(model, parallelism, world)
    if quantization and mesh is not None:
        raise ParallelismError(f"parallelism: {quantization} weights cannot be divided; {WHOLE_COPIES}")
    if mesh is not None:
        from kdtune.parallel.tensor_parallel import apply_tensor_parallel  # a second, see kdtune/tensor_types.py

        apply_tensor_parallel(model, mesh)
    if activation_checkpointing:
        apply_activation_checkpointing(model, activation_checkpointing)
    if activation_offloading:
        apply_activation_offloading(model)
    if compile:
        # For tensor-parallel layers, torch 2.13's compiler recurses endlessly with symbolic lengths.
        apply_compile(model, dynamic=parallelism.sizes(world.size)[TP_DIM] == 1)
    if mesh is not None:
        from kdtune.parallel.fsdp import apply_fsdp

        apply_fsdp(model, mesh, parallelism)

    if source is not None:
        model = source.load(model, dtype=dtype, device=device, quantization=quantization)
    elif quantization:
        quantize(model, quantization)
    return load_adapter(model, resumed) if resumed else model


def _check_room(builder: Builder | None, device: torch.device) -> None:
    """Raise if random weights, which are drawn in fp32, exceed all of the device's memory."""
    config = model_config(builder, None)
    if not isinstance(config, TransformerConfig):
        return  # of a model of the user's own
    needed = 4 * config.num_parameters
    if device.type == "cuda":
        room = torch.cuda.get_device_properties(device).total_memory
    else:
        room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > room:
        raise ConfigError(
            f"a model of {config.num_parameters:,} parameters (embed_dim={config.embed_dim}, num_layers={config.num_layers}, "
            f"vocab_size={config.vocab_size}) starts from random weights of {needed / 1e9:,.1f} GB, and {device} has "
            f"{room / 1e9:,.1f} GB of memory; give smaller sizes, or a checkpointer"
        )


def apply_compile(model: nn.Module, *, dynamic: bool = True) -> None:
    """Compile each of the model's `layers` in place; parameter names stay the same.

    The layers are alike: one is compiled, in a fraction of the whole model's time, and its code serves all. `dynamic`:
    once for batches of any length; false: for each length, up to torch's limit, beyond which further lengths run
    uncompiled.
    """
    for layer in model.layers:  # type: ignore[union-attr]
        layer.compile(dynamic=dynamic)
