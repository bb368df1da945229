"""Quantized models as folders: torchao's tensors in a safetensors file, the scheme in config.json.

File name and `quant_method` are our own: transformers finds no weights in such a folder, so it cannot mistake packed
numbers for a model's weights. In the file a weight `a.b.weight` is several tensors, `a.b._weight_qdata` and so on; the
header's metadata under the weight's name say how to reassemble it. This is torchao's own layout, extended to NF4.
"""

import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdtune.checkpoint.huggingface import CONFIG, open_safetensors
from kdtune.checkpoint.tensors import check_num_layers
from kdtune.errors import CheckpointError
from kdtune.json_files import read_json
from kdtune.models import Family, Transformer, TransformerConfig, family_of, read_hf_config, weight_shapes
from kdtune.models.nf4 import nf4_from_parts, quiet_torchao
from kdtune.models.quantization import SCHEMES, scheme_problems

WEIGHTS = "model.quantized.safetensors"
QUANT_METHOD = "kdtune"
NF4 = "NF4Tensor"


def weight_files(folder: Path) -> list[Path]:
    """Return the folder's file of quantized weights; empty if it holds another kind of model."""
    return [folder / WEIGHTS] if (folder / WEIGHTS).is_file() else []


def read_config(folder: Path, named: Family | None = None) -> TransformerConfig:
    """Return the folder's config, of a kdtune family or `named`; CheckpointError if damaged or of an unknown scheme."""
    document = read_json(folder / CONFIG)
    _scheme(document, folder / CONFIG)
    try:
        return read_hf_config({**document, "quantization_config": None}, named)
    except CheckpointError as error:
        raise CheckpointError(f"{folder / CONFIG}: {str(error).removeprefix(CONFIG + ': ')}") from error


def check(file: Path, named: Family | None = None) -> TransformerConfig:
    """Check the file's tensor names against its config, and return that; CheckpointError if they disagree."""
    config = read_config(file.parent, named)
    with open_safetensors(file) as handle:
        check_num_layers(config, len(handle.keys()), file)
        _keys_by_weight(file, handle, config, _names(config))
    return config


def fill_model(model: Transformer, file: Path, *, dtype: torch.dtype | None, device: torch.device | str) -> Transformer:
    """Load the file's weights, frozen, into the model (on the meta device or not) on `device` and return it.

    Raises:
        CheckpointError: `dtype` is another than the stored one, the device lacks the scheme, the model has adapters,
            or file or config is damaged.
    """
    device = torch.device(device)
    keys = family_of(model.config).hf_keys
    document = read_json(file.parent / CONFIG)
    scheme = _scheme(document, file.parent / CONFIG)
    parameters = dict(model.named_parameters())
    expected = set(_names(model.config))
    if added := [name for name in parameters if name not in expected]:
        raise CheckpointError(
            f"{file.parent}: holds {scheme} weights, which are for use and not for training; the model has {added[0]!r} "
            "beside them: train on the folder that was quantized"
        )
    with open_safetensors(file, str(device)) as handle:
        keys_by_weight = _keys_by_weight(file, handle, model.config, list(parameters))
        # The final norm is never quantized: its dtype is the one that the weights were quantized from.
        stored = handle.get_tensor(keys.from_kdtune("norm.weight")).dtype
        if dtype not in (None, stored):
            raise CheckpointError(
                f"{file}: holds {scheme} weights made from {dtype_name(stored)}, which cannot be turned into {dtype_name(dtype)}; "
                f"load them as stored (dtype null or {dtype_name(stored)}), or quantize the model in {dtype_name(dtype)}"
            )
        if problems := scheme_problems(scheme, device, stored):
            raise CheckpointError(f"{file}: {problems[0]}")
        metadata = handle.metadata() or {}
        for name, parameter in parameters.items():
            hf_name = keys.from_kdtune(name)
            parts = {key: handle.get_tensor(key) for key in keys_by_weight[name]}
            weight = _unflatten(file, hf_name, parts, metadata[hf_name]) if hf_name in metadata else parts[hf_name]
            if weight.shape != parameter.shape:
                raise CheckpointError(
                    f"{file}: tensor {hf_name!r}: shape {list(weight.shape)} found, {list(parameter.shape)} expected; "
                    "weights and config do not belong together: quantize the model again"
                )
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, nn.Parameter(weight, requires_grad=False))
    model.tie_weights()
    return model


def _scheme(document: Mapping[str, Any], path: Path) -> str:
    found = document.get("quantization_config")
    if (
        not isinstance(found, dict)
        or found.get("quant_method") != QUANT_METHOD
        or found.get("scheme") not in list(SCHEMES)
    ):
        raise CheckpointError(
            f"{path}: quantization_config={reprlib.repr(found)}; quant_method {QUANT_METHOD!r} and a scheme of "
            f"{', '.join(SCHEMES)} expected beside {WEIGHTS}: quantize the model again"
        )
    scheme: str = found["scheme"]
    return scheme


def _names(config: TransformerConfig) -> list[str]:
    """Return the parameter names of such a model, a tied one once."""
    return [name for name in weight_shapes(config) if not (config.tie_embeddings and name == "output.weight")]


def name_prefix(hf_name: str) -> str:
    """Return the prefix of the names of a quantized weight's parts."""
    module, _, weight = hf_name.rpartition(".")
    return f"{module}._{weight}_"


def _keys_by_weight(file: Path, handle: Any, config: TransformerConfig, names: list[str]) -> dict[str, list[str]]:
    """Return the file's tensor names for each weight (our name); there must be no others."""
    keys = list(handle.keys())
    metadata = handle.metadata() or {}
    by_weight = {}
    for name in names:
        hf_name = family_of(config).hf_keys.from_kdtune(name)
        prefix = name_prefix(hf_name)
        found = [key for key in keys if key.startswith(prefix)] if hf_name in metadata else [hf_name]
        if not found or not set(found) <= set(keys):
            raise CheckpointError(f"{file}: tensor {hf_name!r} missing; quantize the model again")
        by_weight[name] = found
    used = {key for found in by_weight.values() for key in found}
    if extra := [key for key in keys if key not in used]:
        raise CheckpointError(f"{file}: tensor {extra[0]!r} unexpected; weights and config do not belong together")
    return by_weight


def _unflatten(file: Path, hf_name: str, parts: dict[str, Tensor], metadata: str) -> Tensor:
    """Reassemble a quantized weight: the inverse of `save_quantized._flatten`."""
    try:
        about = json.loads(metadata)
        if about["_type"] == NF4:
            own = {key.removeprefix(name_prefix(hf_name)): part for key, part in parts.items()}
            shape, dtype = torch.Size(about["shape"]), getattr(torch, about["dtype"])
            return nf4_from_parts(own, shape, dtype, scaler_block_size=about["scaler_block_size"])
        with quiet_torchao():
            from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict

        state, _ = unflatten_tensor_state_dict(parts, {hf_name: metadata, "tensor_names": json.dumps([hf_name])})
        weight: Tensor = state[hf_name]
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise CheckpointError(
            f"{file}: tensor {hf_name!r}: its parts do not make a quantized weight ({type(error).__name__}: {error}); "
            "the file is damaged or of another torchao: quantize the model again"
        ) from error
    return weight


def dtype_name(dtype: torch.dtype | None) -> str:
    """Return a dtype as the file's metadata name it, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")
