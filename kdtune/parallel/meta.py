"""What a builder or a checkpoint says of a model: its config, and the model without weights."""

from collections.abc import Callable

import torch

from kdtune.checkpoint import Checkpointer
from kdtune.errors import ConfigError
from kdtune.models import Transformer, TransformerConfig, has_adapters, new_model, on_meta_device

Builder = Callable[[], Transformer]
Adapter = Callable[..., Transformer]
"""Called with the model as `model`."""


def meta_model(
    builder: Builder | None, checkpointer: Checkpointer | None, *, adapter: Adapter | None = None, dtype: torch.dtype
) -> Transformer:
    """Return the model that `build_model` would build, without weights, on the meta device; adapters are newly initialized.

    Raises:
        ConfigError: with neither a builder nor a checkpointer, or where the adapter does not fit the model.
        CheckpointError: the builder is None and the checkpoint does not describe its model.
    """
    with on_meta_device():
        return add_adapters(initial_model(builder, checkpointer).to(dtype), adapter)


def model_config(builder: Builder | None, checkpointer: Checkpointer | None) -> TransformerConfig:
    """Return the config of the model that `build_model` would build; reads no weights.

    Raises:
        ConfigError: with neither a builder nor a checkpointer.
        CheckpointError: it has to come from a checkpoint that does not describe its model.
    """
    if builder is None and checkpointer is not None:
        return checkpointer.model_config()
    with on_meta_device():
        return initial_model(builder, checkpointer).config


def initial_model(builder: Builder | None, checkpointer: Checkpointer | None) -> Transformer:
    """Return the builder's model, or one of the checkpoint's config, as it is before weights are loaded."""
    if builder is not None:
        return builder()
    if checkpointer is None:
        raise ConfigError("neither a builder nor a checkpointer is given; set one of them")
    return new_model(checkpointer.model_config())


def add_adapters(model: Transformer, adapter: Adapter | None) -> Transformer:
    """Return the model with adapters; with None, as it is."""
    if adapter is None:
        return model
    if has_adapters(model):
        raise ConfigError(
            "model, adapter: the builder in `model` makes adapters already; remove one: ~model or ~adapter"
        )
    return adapter(model=model)
