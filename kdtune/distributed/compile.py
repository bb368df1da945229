"""torch.compile, applied from outside."""

from torch import nn


def apply_compile(model: nn.Module) -> None:
    """Compiles each layer in place, for batches of any length. Parameter names stay as they are.

    Layer by layer, because the layers are alike: one is compiled and its code serves all, in a fraction of the time that
    the whole model would take.
    """
    for layer in model.layers:  # type: ignore[union-attr]
        layer.compile(dynamic=True)
