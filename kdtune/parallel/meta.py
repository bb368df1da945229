"""What a builder or a checkpoint says of a model: its config, and the model without weights."""

from typing import Any

import torch

from kdtune.config import instantiate
from kdtune.errors import ConfigError
from kdtune.models import Transformer, TransformerConfig, has_adapters


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
        return adapted_model(model, adapter).to(dtype)


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


def adapted_model(model: Transformer, adapter: Any) -> Transformer:
    """Return the model with the adapters of this component node; None: the model as it is."""
    if adapter is None:
        return model
    if has_adapters(model):
        raise ConfigError(
            "model, adapter: the builder in `model` makes adapters already; remove one: ~model or ~adapter"
        )
    adapted: Transformer = instantiate(adapter, model=model)
    return adapted
