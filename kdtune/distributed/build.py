"""Builds a model for a run: builder and checkpoint in, weights on the device out."""

from pathlib import Path
from typing import Any

import torch

from kdtune.checkpoint import Checkpointer
from kdtune.config import instantiate
from kdtune.errors import ConfigError
from kdtune.models import Transformer


def build_model(
    builder: Any, checkpointer: Any, *, dtype: torch.dtype, device: torch.device, weights: Path | None = None
) -> Transformer:
    """The model of a run, its weights in `dtype` on `device`.

    Args:
        builder: component node of a builder, or None for the checkpoint's own config. A builder is built on the meta
            device and must agree with the checkpoint.
        checkpointer: component node, or None for random weights (the seed is the caller's business).
        dtype: of the weights.
        device: where the weights go, each tensor directly.
        weights: a folder that takes the checkpointer's place, such as the step folder a run is resumed from.

    Raises:
        ConfigError: with neither a builder nor a checkpointer.
        CheckpointError: where the files cannot be read or do not fit the builder.
    """
    source = Checkpointer(str(weights)) if weights else instantiate(checkpointer)
    if source is None:
        if builder is None:
            raise ConfigError("neither a builder nor a checkpointer is given; set one of them")
        with device:
            model: Transformer = instantiate(builder)
        return model.to(dtype)
    with torch.device("meta"):
        model = instantiate(builder)
    loaded: Transformer = source.load(model, dtype=dtype, device=device)
    return loaded
