"""Decoders in plain PyTorch: families, published sizes, adapters and quantization."""

from typing import Any

import lazy_loader

_attached, _listed, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    if name in __all__:
        return _attached(name)
    from kdtune.models.builders import BUILDERS

    if name in BUILDERS:
        return BUILDERS[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    from kdtune.models.builders import BUILDERS

    return sorted({*_listed(), *BUILDERS})
