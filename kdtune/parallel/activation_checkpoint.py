"""Activation checkpointing: recompute a layer's activations in backward instead of keeping them."""

from functools import partial

from torch.utils.checkpoint import checkpoint

from kdtune.models import Transformer


def apply_activation_checkpointing(model: Transformer) -> None:
    """Make every layer keep only its input in forward and run again in backward; the gradients stay the same.

    Replaces each layer's ``forward``, not the layer: parameter names, module types and state dicts stay as they are.
    Applying it twice is the same as once. Apply it before ``fully_shard``.
    """
    for layer in model.layers:
        if "forward" not in vars(layer):
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
