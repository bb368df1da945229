"""Build a model for a run: from builder and checkpoint to weights on the device."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kdtune.checkpoint import Checkpointer, is_adapter_folder, load_adapter
from kdtune.config import instantiate
from kdtune.distributed import Parallelism, World
from kdtune.errors import CheckpointError, ConfigError
from kdtune.models import Transformer, TransformerConfig, has_adapters
from kdtune.parallel.fsdp import parallelize
from kdtune.parallel.meta import adapted_model, model_config


def build_model(
    builder: Any,
    checkpointer: Any,
    *,
    adapter: Any = None,
    dtype: torch.dtype | None,
    device: torch.device,
    weights: Path | None = None,
    prepare: Callable[[Transformer], Transformer] | None = None,
) -> Transformer:
    """Build the model of a run, with its weights in `dtype` on `device`.

    Args:
        builder: component node of a builder, or None for the checkpoint's own config. A builder is built on the meta
            device and must agree with the checkpoint.
        checkpointer: component node, or None for random weights (the seed is the caller's business).
        adapter: component node such as `kdtune.models.apply_lora`, which receives the model as `model`; None: no adapters
            except those a builder makes.
        dtype: dtype of the weights; None: as stored.
        device: device of the weights; each tensor is loaded directly to it.
        weights: a folder that replaces the checkpointer's, such as the step folder a run is resumed from. If it holds an
            adapter, the base still comes from the checkpointer and the adapter from here.
        prepare: applied to the model, in its dtype on the meta device, before the weights are loaded, such as
            `shard_model`; it needs a dtype. Random weights are drawn before it, identically on every process.

    Raises:
        ConfigError: with neither a builder nor a checkpointer, or where the adapter does not fit the model.
        CheckpointError: where the files cannot be read or do not fit the builder or the adapter.
    """
    resumed = weights if weights is not None and is_adapter_folder(weights) else None
    source = Checkpointer(str(weights)) if weights and not resumed else instantiate(checkpointer)
    if source is None:
        if builder is None:
            raise ConfigError("neither a builder nor a checkpointer is given; set one of them")
        _check_room(model_config(builder, None), device)
        with device:
            model: Transformer = instantiate(builder)
        model = adapted_model(model.to(dtype), adapter)
        if prepare is not None:
            model = prepare(model)
    else:
        with torch.device("meta"):
            model = instantiate(builder)
            if model is None and (adapter is not None or prepare is not None):
                model = Transformer(source.model_config())
            model = adapted_model(model, adapter)
        if weights and not resumed and model is not None and has_adapters(model):
            raise CheckpointError(
                f"{weights}: holds a whole model, an adapter expected: the run is to train an adapter"
            )
        if prepare is not None:
            model = prepare(model.to(dtype))
        model = source.load(model, dtype=dtype, device=device)
    return load_adapter(model, resumed) if resumed else model


def distributed_model(
    builder: Any,
    checkpointer: Any,
    parallelism: Parallelism,
    world: World,
    *,
    dtype: torch.dtype,
    adapter: Any = None,
    weights: Path | None = None,
    compile: bool = False,
    activation_checkpointing: bool = False,
    trainable: bool = True,
) -> Transformer:
    """Like `build_model`, for a model parallelized over processes: shards are placed before the weights are read.

    Args:
        builder: as for `build_model`.
        checkpointer: as for `build_model`.
        parallelism: how it is parallelized.
        world: the processes.
        dtype: of the weights.
        adapter: as for `build_model`.
        weights: as for `build_model`.
        compile: torch.compile each layer.
        activation_checkpointing: recompute activations in backward.
        trainable: False freezes all parameters first.
    """

    def prepare(model: Transformer) -> Transformer:
        if not trainable:
            model.requires_grad_(False)
        return parallelize(
            model, parallelism, world, compile=compile, activation_checkpointing=activation_checkpointing
        )

    return build_model(builder, checkpointer, adapter=adapter, dtype=dtype, weights=weights, device=parallelism.home(world),
                       prepare=prepare)  # fmt: skip


def _check_room(config: Any, device: torch.device) -> None:
    """Raise if random weights, which are drawn in fp32, exceed all of the device's memory."""
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
