"""torch.compile, applied from outside."""

from torch import nn


def apply_compile(model: nn.Module, *, dynamic: bool = True) -> None:
    """Compiles each layer in place. Parameter names stay as they are.

    Layer by layer, because the layers are alike: one is compiled and its code serves all, in a fraction of the time that
    the whole model would take.

    Args:
        model: with `layers`.
        dynamic: once for batches of any length; false: anew for each length, until torch stops at its limit and computes
            further ones as without it.
    """
    for layer in model.layers:  # type: ignore[union-attr]
        layer.compile(dynamic=dynamic)
