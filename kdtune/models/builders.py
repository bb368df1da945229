"""Builders of the published sizes, with random weights, on the current default device and dtype; with and without adapters.

``lora_X(...)`` is ``apply_lora(X(), ...)``; ``qlora_X`` has an NF4 base by default. Their signatures are those of the builder and
of :func:`kdtune.models.apply_lora`, so that a config's arguments are checked by name and type before a weight is read.
"""

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from kdtune.models.architecture import Family, TransformerConfig
from kdtune.models.known_families import FAMILIES
from kdtune.models.llama import llama
from kdtune.models.lora import apply_lora
from kdtune.models.transformer import Transformer

Builder = Callable[..., Transformer]


def _builder(name: str, title: str, config: TransformerConfig, family: Family) -> Builder:
    def build() -> Transformer:
        return Transformer(replace(config, family=family))

    tied = ", tied head" if config.tie_embeddings else ""
    context = f"{config.max_seq_len // 1024}k context"
    build.__doc__ = f"{title}: {config.num_parameters:,} parameters{tied}, {context}."
    build.__name__ = build.__qualname__ = name
    return build


def _adapted(builder: Builder, *, quantized: bool) -> Builder:
    of_builder = inspect.signature(builder).parameters
    of_lora = dict(inspect.signature(apply_lora).parameters)
    del of_lora["model"]
    if quantized:
        of_lora["quantize_base"] = of_lora["quantize_base"].replace(default=True)
    signature = inspect.Signature([*of_builder.values(), *of_lora.values()], return_annotation=Transformer)

    def build(**arguments: Any) -> Transformer:
        bound = signature.bind(**arguments)
        bound.apply_defaults()
        model = builder(**{name: bound.arguments[name] for name in of_builder})
        return apply_lora(model, **{name: bound.arguments[name] for name in of_lora})

    build.__name__ = build.__qualname__ = f"{'q' if quantized else ''}lora_{builder.__name__}"
    base = " with an NF4 base" if quantized else ""
    build.__doc__ = f"``apply_lora({builder.__name__}(), ...)``{base}; the arguments are those of these two."
    build.__signature__ = signature  # type: ignore[attr-defined]
    return build


_PLAIN = [llama, *(_builder(name, *size, family) for family in FAMILIES for name, size in family.sizes.items())]
BUILDERS: dict[str, Builder] = {
    each.__name__: each
    for plain in _PLAIN
    for each in (plain, _adapted(plain, quantized=False), _adapted(plain, quantized=True))
}
