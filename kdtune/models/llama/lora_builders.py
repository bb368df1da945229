"""Builders with adapters: ``lora_X(...)`` is ``apply_lora(X(), ...)``; ``qlora_X`` has an NF4 base by default.

Their signatures are those of the builder and of :func:`kdtune.models.apply_lora`, so that a config's arguments are
checked by name and type before a weight is read.
"""

import inspect
from collections.abc import Callable
from typing import Any

from kdtune.models.llama import builders
from kdtune.models.lora import apply_lora
from kdtune.models.transformer import Transformer


def _adapted(builder: Callable[..., Transformer], *, quantized: bool = False) -> Callable[..., Transformer]:
    of_builder = inspect.signature(builder).parameters
    of_lora = dict(inspect.signature(apply_lora).parameters)
    del of_lora["model"]
    if quantized:
        of_lora["quantize_base"] = of_lora["quantize_base"].replace(default=True)
    signature = inspect.Signature([*of_builder.values(), *of_lora.values()], return_annotation=Transformer)

    def build(**arguments: Any) -> Transformer:
        given = signature.bind(**arguments)
        given.apply_defaults()
        model = builder(**{name: given.arguments[name] for name in of_builder})
        return apply_lora(model, **{name: given.arguments[name] for name in of_lora})

    build.__name__ = build.__qualname__ = f"{'q' if quantized else ''}lora_{builder.__name__}"
    base = " with an NF4 base" if quantized else ""
    build.__doc__ = f"``apply_lora({builder.__name__}(), ...)``{base}; the arguments are those of these two."
    build.__signature__ = signature  # type: ignore[attr-defined]
    return build


lora_llama = _adapted(builders.llama)
lora_llama2_7b = _adapted(builders.llama2_7b)
lora_llama2_13b = _adapted(builders.llama2_13b)
lora_llama2_70b = _adapted(builders.llama2_70b)
lora_llama3_8b = _adapted(builders.llama3_8b)
lora_llama3_70b = _adapted(builders.llama3_70b)
lora_llama3_1_8b = _adapted(builders.llama3_1_8b)
lora_llama3_1_70b = _adapted(builders.llama3_1_70b)
lora_llama3_1_405b = _adapted(builders.llama3_1_405b)
lora_llama3_2_1b = _adapted(builders.llama3_2_1b)
lora_llama3_2_3b = _adapted(builders.llama3_2_3b)
lora_smollm2_135m = _adapted(builders.smollm2_135m)
lora_smollm2_360m = _adapted(builders.smollm2_360m)
lora_smollm2_1_7b = _adapted(builders.smollm2_1_7b)

qlora_llama = _adapted(builders.llama, quantized=True)
qlora_llama2_7b = _adapted(builders.llama2_7b, quantized=True)
qlora_llama2_13b = _adapted(builders.llama2_13b, quantized=True)
qlora_llama2_70b = _adapted(builders.llama2_70b, quantized=True)
qlora_llama3_8b = _adapted(builders.llama3_8b, quantized=True)
qlora_llama3_70b = _adapted(builders.llama3_70b, quantized=True)
qlora_llama3_1_8b = _adapted(builders.llama3_1_8b, quantized=True)
qlora_llama3_1_70b = _adapted(builders.llama3_1_70b, quantized=True)
qlora_llama3_1_405b = _adapted(builders.llama3_1_405b, quantized=True)
qlora_llama3_2_1b = _adapted(builders.llama3_2_1b, quantized=True)
qlora_llama3_2_3b = _adapted(builders.llama3_2_3b, quantized=True)
qlora_smollm2_135m = _adapted(builders.smollm2_135m, quantized=True)
qlora_smollm2_360m = _adapted(builders.smollm2_360m, quantized=True)
qlora_smollm2_1_7b = _adapted(builders.smollm2_1_7b, quantized=True)
