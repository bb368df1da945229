"""Build a model for a run: from builder and checkpoint to weights on the devices of its processes."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from kdtune.checkpoint import Checkpointer, is_adapter_folder, load_adapter
from kdtune.config import factory, instantiate
from kdtune.constants import TP_DIM
from kdtune.distributed import SINGLE_PROCESS, Parallelism, World, parallelism_problems, world_size
from kdtune.errors import CheckpointError, ConfigError
from kdtune.models import Transformer, TransformerConfig, has_adapters
from kdtune.parallel.fsdp import apply_fsdp, device_mesh, model_problem
from kdtune.parallel.meta import Adapter, Builder, add_adapters, initial_model, meta_model, model_config
from kdtune.parallel.tensor_parallel import apply_tensor_parallel


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
    activation_checkpointing: bool = False,
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
        activation_checkpointing: recompute activations in backward.
        compile: torch.compile each layer.

    Raises:
        ConfigError: with neither a builder nor a checkpointer, or where the adapter does not fit the model, or the sizes of
            the parallelism the number of processes.
        ParallelismError: the parallelism does not fit the model.
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

    with device if source is None else torch.device("meta"):
        model = initial_model(builder, source).to(dtype)
        model = add_adapters(model, adapter)
    if weights is not None and not resumed and has_adapters(model):
        raise CheckpointError(f"{weights}: holds a whole model, an adapter expected: the run is to train an adapter")
    if not trainable:
        model.requires_grad_(False)

    mesh = device_mesh(model, parallelism, world)
    apply_tensor_parallel(model, mesh)
    if activation_checkpointing:
        apply_activation_checkpointing(model)
    if compile:
        # For tensor-parallel layers, torch 2.13's compiler recurses endlessly with symbolic lengths.
        apply_compile(model, dynamic=parallelism.sizes(world.size)[TP_DIM] == 1)
    apply_fsdp(model, mesh, parallelism)

    if source is not None:
        model = source.load(model, dtype=dtype, device=device)
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


def apply_activation_checkpointing(model: Transformer) -> None:
    """Make every layer keep only its input in forward and run again in backward; the gradients stay the same.

    Replaces each layer's ``forward``, not the layer: parameter names, module types and state dicts stay as they are.
    Applying it twice is the same as once. Apply it before ``fully_shard``.
    """
    for layer in model.layers:
        if "forward" not in vars(layer):
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def problems(cfg: Any) -> list[str]:
    """Return why a config's models cannot be divided among the processes that were started, one sentence each; read no weights.

    cfg: with the key parallelism, and those of model, checkpointer, adapter, teacher_parallelism, teacher_processes,
    teacher_model and teacher_checkpointer that its recipe has.
    """
    parallelism: Parallelism = instantiate(cfg.parallelism)
    teacher: Parallelism | None = instantiate(getattr(cfg, "teacher_parallelism", None))
    num_teachers = getattr(cfg, "teacher_processes", 0)
    if found := parallelism_problems(parallelism, teacher, teacher_processes=num_teachers):
        return found
    teacher_name = "teacher_parallelism" if teacher else "parallelism, for the teacher"
    for name, prefix, settings, num_processes in (
        ("parallelism", "", parallelism, world_size() - num_teachers),
        (teacher_name, "teacher_", teacher or parallelism, num_teachers or world_size()),
    ):
        builder = factory(getattr(cfg, f"{prefix}model", None))
        source = instantiate(getattr(cfg, f"{prefix}checkpointer", None))
        # These alone ask for something of the model. A checkpoint that cannot be read is told elsewhere.
        is_asked = settings.sizes(num_processes)[TP_DIM] > 1 or settings.cpu_offload
        if is_asked and (builder or source) and not (source and source.problems()):
            adapter = None if prefix else factory(getattr(cfg, "adapter", None))
            model = meta_model(builder, source, adapter=adapter, dtype=torch.float32)
            if problem := model_problem(model, settings, num_processes):
                found.append(f"{name}: {problem}")
    return found
