"""Write a quantized model's folder; kdtune/checkpoint/quantized.py describes and reads it."""

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from kdtune.checkpoint.atomic import writing
from kdtune.checkpoint.quantized import NF4, QUANT_METHOD, WEIGHTS, dtype_name, name_prefix
from kdtune.checkpoint.save import SupportsSave, description
from kdtune.models import Transformer, family_of
from kdtune.models.nf4 import is_nf4, nf4_parts, quiet_torchao
from kdtune.models.quantization import is_quantized


def write_quantized(
    model: Transformer,
    folder: Path,
    *,
    scheme: str,
    group_size: int | None = None,
    base: str | Path | None = None,
    tokenizer: SupportsSave | None = None,
) -> None:
    """Write a quantized model into an existing folder, with its config, tokenizer and licence, as `write_model` does.

    `scheme` and `group_size` say how it was quantized, for its config. CheckpointError if the disk is full or cannot be
    written.
    """
    tensors: dict[str, Tensor] = {}
    metadata = {"format": "pt"}
    keys = family_of(model.config).hf_keys
    for name, parameter in model.named_parameters():
        name = keys.from_kdtune(name)
        if is_quantized(parameter):
            parts, metadata[name] = _flatten(name, parameter.detach())
            tensors |= {key: part.cpu() for key, part in parts.items()}
        else:
            tensors[name] = parameter.detach().cpu().contiguous()
    quantization = {"quant_method": QUANT_METHOD, "scheme": scheme, "group_size": group_size}
    with writing(folder):
        save_file(tensors, folder / WEIGHTS, metadata=metadata)
        description(model, base=base, tokenizer=tokenizer, quantization=quantization)(folder)


def _flatten(hf_name: str, weight: Tensor) -> tuple[dict[str, Tensor], str]:
    """Split a quantized weight into parts by name, and the metadata to reassemble them."""
    if is_nf4(weight):
        scales: int = weight.scaler_block_size  # type: ignore[attr-defined]
        shape, dtype = list(weight.shape), dtype_name(weight.dtype)
        about = {"_type": NF4, "shape": shape, "dtype": dtype, "scaler_block_size": scales}
        return {name_prefix(hf_name) + field: part for field, part in nf4_parts(weight).items()}, json.dumps(about)
    with quiet_torchao():
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    parts, metadata = flatten_tensor_state_dict({hf_name: weight})
    return parts, metadata[hf_name]
