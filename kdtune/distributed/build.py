"""Build a model for a run: from builder and checkpoint to weights on the device."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kdtune.checkpoint import Checkpointer, is_adapter_folder, load_adapter
from kdtune.config import instantiate
from kdtune.constants import TP_DIM
from kdtune.distributed.parallelism import Parallelism, model_problem, parallelism_problems, parallelize
from kdtune.distributed.world import World, world_size
from kdtune.errors import CheckpointError, ConfigError
from kdtune.models import Transformer, TransformerConfig, has_adapters


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
        model = _adapted(model.to(dtype), adapter)
        if prepare is not None:
            model = prepare(model)
    else:
        with torch.device("meta"):
            model = instantiate(builder)
            if model is None and (adapter is not None or prepare is not None):
                model = Transformer(source.model_config())
            model = _adapted(model, adapter)
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


def meta_model(builder: Any, checkpointer: Any, *, adapter: Any = None, dtype: torch.dtype) -> Transformer:
    """Return the model that `build_model` would build, without weights, on the meta device; adapters are newly initialized.

    Raises:
        ConfigError: with neither a builder nor a checkpointer, or where the adapter does not fit the model.
        CheckpointError: the builder is None and the checkpoint does not describe its model.
    """
    if builder is None and checkpointer is None:
        raise ConfigError("neither a builder nor a checkpointer is given; set one of them")
    with torch.device("meta"):
        model = instantiate(builder)
        if model is None:
            model = Transformer(instantiate(checkpointer).model_config())
        return _adapted(model, adapter).to(dtype)


def spread_problems(cfg: Any) -> list[str]:
    """Return why a config's models cannot be spread over the processes that were started, one sentence each; read no weights.

    cfg: with the key parallelism, and those of model, checkpointer, adapter, teacher_parallelism, teacher_processes,
    teacher_model and teacher_checkpointer that its recipe has.
    """
    teacher_node, apart = getattr(cfg, "teacher_parallelism", None), getattr(cfg, "teacher_processes", 0)
    if found := parallelism_problems(cfg.parallelism, teacher_node, teacher_processes=apart):
        return found
    teacher_name = "teacher_parallelism" if teacher_node else "parallelism, for the teacher"
    for name, prefix, node, num_processes in (
        ("parallelism", "", cfg.parallelism, world_size() - apart),
        (teacher_name, "teacher_", teacher_node or cfg.parallelism, apart or world_size()),
    ):
        parallelism: Parallelism = instantiate(node)
        builder, checkpointer = (getattr(cfg, f"{prefix}{key}", None) for key in ("model", "checkpointer"))
        source = instantiate(checkpointer)
        # These alone ask for something of the model. A checkpoint that cannot be read is told elsewhere.
        is_asked = parallelism.sizes(num_processes)[TP_DIM] > 1 or parallelism.cpu_offload
        if is_asked and (builder or source) and not (source and source.problems()):
            adapter = None if prefix else getattr(cfg, "adapter", None)
            model = meta_model(builder, checkpointer, adapter=adapter, dtype=torch.float32)
            if problem := model_problem(model, parallelism, num_processes):
                found.append(f"{name}: {problem}")
    return found


def model_config(builder: Any, checkpointer: Any) -> TransformerConfig:
    """Return the config of the model that `build_model` would build; reads no weights.

    Raises:
        CheckpointError: it has to come from a checkpoint that does not describe its model.
    """
    if builder is None:
        config: TransformerConfig = instantiate(checkpointer).model_config()
        return config
    with torch.device("meta"):
        model: Transformer = instantiate(builder)
    return model.config


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


def _adapted(model: Transformer, adapter: Any) -> Transformer:
    if adapter is None:
        return model
    if has_adapters(model):
        raise ConfigError(
            "model, adapter: the builder in `model` makes adapters already; remove one: ~model or ~adapter"
        )
    adapted: Transformer = instantiate(adapter, model=model)
    return adapted
