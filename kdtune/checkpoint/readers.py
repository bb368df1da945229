"""Describe a stored model, in any format and family: its config, and its unread tensors by kdtune's names."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from kdtune.checkpoint import huggingface, meta
from kdtune.checkpoint.tensors import LazyModel, LazyTensor, check_num_layers
from kdtune.errors import CheckpointError
from kdtune.gguf_file import read_gguf as read_gguf_header
from kdtune.json_files import read_json
from kdtune.models import (
    Family,
    TransformerConfig,
    family_of,
    family_of_gguf,
    family_of_meta,
    read_hf_config,
    weight_shapes,
)
from kdtune.models.architecture import KeyMap, unpermute
from kdtune.models.file_configs import ROPE_FACTORS, config_from_gguf
from kdtune.models.transformer import rotary_heads


def hf_config(folder: Path, named: Family | None = None) -> TransformerConfig:
    """Return the config of the model in a Hugging Face folder; `named` is its family, if not one of kdtune's."""
    path = folder / huggingface.CONFIG
    document = read_json(path)
    with _in_file(path):
        return read_hf_config(document, named)


def read_huggingface(files: list[Path], named: Family | None) -> LazyModel:
    """Describe the model in safetensors files and the config.json beside them."""
    folder = files[0].parent
    config = hf_config(folder, named)
    index = huggingface.read_index(folder) if (folder / huggingface.INDEX).is_file() else None
    if index is not None and set(index.values()) != {file.name for file in files}:
        index = None
    tensors = huggingface.stored_tensors(files, index)
    # Saved from a model without head, whose names lack the part before the layers.
    prefix = "" if any(name.startswith("model.") for name in tensors) else "model."
    renamed = {name if name.startswith("lm_head.") else prefix + name: stored for name, stored in tensors.items()}
    keys = family_of(config).hf_keys
    return LazyModel(config, _by_our_names(renamed, keys), lambda name: keys.from_kdtune(name).removeprefix(prefix))


def read_meta(files: list[Path], named: Family | None) -> LazyModel:
    """Describe the model in Meta's consolidated.NN.pth files and the params.json beside them."""
    path = files[0].parent / meta.PARAMS
    params = read_json(path)
    parts = [meta.load_part(file) for file in files]
    with _in_file(path):
        keys, config_from_meta = family_of_meta(named)
    is_tied = keys.from_kdtune("output.weight") not in parts[0]
    embedding = parts[0].get(keys.from_kdtune("tok_embeddings.weight"))
    # Llama 2's params.json leaves the vocabulary to the tokenizer; its parts are cut along the other dimension.
    rows = None if embedding is None else len(embedding)
    with _in_file(path):
        config = config_from_meta(params, vocab_size=rows, tie_embeddings=True if is_tied else None)
    check_num_layers(config, len(parts[0]), path.parent)
    shapes = {keys.from_kdtune(name): shape for name, shape in weight_shapes(config).items()}
    return _stored_model(config, meta.stored_tensors(files, parts, shapes), keys)


def read_gguf(files: list[Path], named: Family | None) -> LazyModel:
    """Describe the model in a GGUF file."""
    from kdtune.checkpoint import gguf

    file = files[0]
    header = read_gguf_header(file)
    stored, metadata = gguf.stored_tensors(file, header), header.metadata
    with _in_file(file):
        family, keys = family_of_gguf(metadata, named)
    embedding = stored.get(keys.from_kdtune("tok_embeddings.weight"))
    if embedding is not None:
        metadata.setdefault(f"{family.gguf_architecture}.vocab_size", embedding.shape[0])
    factors = stored.get(ROPE_FACTORS)
    with _in_file(file):
        config = (family.config_from_gguf or config_from_gguf)(
            family,
            metadata,
            tie_embeddings=keys.from_kdtune("output.weight") not in stored,
            rope_factors=factors.read() if factors else None,
        )
    return _stored_model(config, stored, keys)


@contextmanager
def _in_file(path: Path) -> Iterator[None]:
    """Prefix the path to the message of an error that knows only the tensor or setting."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {str(error).removeprefix(path.name + ': ')}") from error


def _stored_model(config: TransformerConfig, stored: dict[str, LazyTensor], keys: KeyMap) -> LazyModel:
    tensors = _by_our_names(stored, keys)
    if keys.norm_offset:
        tensors = {
            name: replace(one, pieces=partial(_lowered_pieces, one, keys.norm_offset), part=None)
            if name.endswith("norm.weight")
            else one
            for name, one in tensors.items()
        }
    return LazyModel(config, _unpermuted(tensors, config) if keys.is_interleaved else tensors, keys.from_kdtune)


def _by_our_names(tensors: dict[str, LazyTensor], names: KeyMap) -> dict[str, LazyTensor]:
    renamed = {}
    for name, stored in tensors.items():
        if names.is_derived(name):
            continue
        with _in_file(stored.file):
            renamed[names.to_kdtune(name)] = stored
    return renamed


def _unpermuted(tensors: dict[str, LazyTensor], config: TransformerConfig) -> dict[str, LazyTensor]:
    """Return the tensors with q and k in our row order, from the order that interleaves the halves of each rotary pair."""
    result = {}
    for name, stored in tensors.items():
        heads = rotary_heads(name, config)
        result[name] = (
            stored if heads is None else replace(stored, pieces=partial(_unpermuted_pieces, stored, heads), part=None)
        )
    return result


def _lowered_pieces(stored: LazyTensor, offset: float) -> Iterator[Tensor]:
    yield stored.read() - offset


def _unpermuted_pieces(stored: LazyTensor, num_heads: int) -> Iterator[Tensor]:
    yield unpermute(stored.read(), num_heads)
