"""torch.compile, applied to a model from outside."""

from torch import nn


def apply_compile(model: nn.Module, *, dynamic: bool = True) -> None:
    """Compile each layer in place. Parameter names stay the same.

    Layer by layer, because the layers are alike: one is compiled and its code serves all, in a fraction of the time that
    the whole model would take.

    Args:
        model: with `layers`.
        dynamic: compile once for batches of any length; false: recompile for each length, up to torch's limit, beyond which
            further lengths run uncompiled.
    """
    for layer in model.layers:  # type: ignore[union-attr]
        layer.compile(dynamic=dynamic)
