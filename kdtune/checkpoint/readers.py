"""Describe a stored model, in any format and family: its config, and its unread tensors by kdtune's names."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

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
    text_config,
    weight_shapes,
)
from kdtune.models.architecture import KeyMap, unpermute
from kdtune.models.file_configs import GGUF_FACTORS, config_from_gguf
from kdtune.models.transformer import rotary_heads


def hf_config(folder: Path, named: Family | None = None) -> TransformerConfig:
    """Return the config of the model in a Hugging Face folder; `named` is its family, if not one of kdtune's."""
    path = folder / huggingface.CONFIG
    document = read_json(path)
    with _in_file(path):
        return read_hf_config({**document, "_name_or_path": str(folder)}, named)


def read_huggingface(files: list[Path], named: Family | None) -> LazyModel:
    """Describe the model in safetensors files and the config.json beside them."""
    folder = files[0].parent
    config = hf_config(folder, named)
    index = huggingface.read_index(folder) if (folder / huggingface.INDEX).is_file() else None
    if index is not None and set(index.values()) != {file.name for file in files}:
        index = None
    tensors, skipped = huggingface.stored_tensors(files, index), dict[str, int]()
    if text_config(document := read_json(folder / huggingface.CONFIG), named) is not document:
        tensors, skipped = _text_tensors(tensors)
    # Saved from a model without head, whose names lack the part before the layers.
    keys = family_of(config).hf_keys
    prefix = "" if any(name.startswith(keys.prefix) for name in tensors) else keys.prefix
    renamed = {name if keys.knows(name) else prefix + name: stored for name, stored in tensors.items()}
    ours = _by_our_names(renamed, keys, config)
    return LazyModel(config, ours, lambda name: keys.whole_of(keys.from_kdtune(name)).removeprefix(prefix), skipped)


# Names of a model with parts for images: beginnings of the text part's, as transformers 4 and 5 write them, and of the others'.
_TEXT_PARTS = {"model.language_model.": "model.", "language_model.": ""}
_OTHER_PARTS = ("vision_tower", "multi_modal_projector")


def _text_tensors(tensors: dict[str, LazyTensor]) -> tuple[dict[str, LazyTensor], dict[str, int]]:
    """Return the tensors of the text part, by the names that its own model has, and how many the other parts have."""
    text, skipped = {}, Counter[str]()
    for name, stored in tensors.items():
        other = next((part for part in _OTHER_PARTS if name.removeprefix("model.").startswith(f"{part}.")), None)
        if other is not None:
            skipped[other] += 1
            continue
        begin = next((begin for begin in _TEXT_PARTS if name.startswith(begin)), "")
        text[_TEXT_PARTS.get(begin, "") + name.removeprefix(begin)] = stored
    return text, skipped


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
    factors: dict[str, Any] = {
        argument: stored[name].read()
        for name, argument in GGUF_FACTORS.items()
        if name in stored and keys.is_derived(name)
    }
    with _in_file(file):
        config = (family.config_from_gguf or config_from_gguf)(
            family,
            metadata,
            tie_embeddings=keys.from_kdtune("output.weight") not in stored,
            **factors,
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
    tensors = _by_our_names(stored, keys, config)
    if keys.norm_offset:
        tensors = {
            name: replace(one, pieces=partial(_lowered_pieces, one, keys.norm_offset), part=None)
            if name.endswith("norm.weight")
            else one
            for name, one in tensors.items()
        }
    return LazyModel(
        config,
        _unpermuted(tensors, config) if keys.is_interleaved else tensors,
        lambda name: keys.whole_of(keys.from_kdtune(name)),
    )


def _by_our_names(tensors: dict[str, LazyTensor], names: KeyMap, config: TransformerConfig) -> dict[str, LazyTensor]:
    shapes = weight_shapes(config) if names.fused else {}
    renamed: dict[str, LazyTensor] = {}
    for name, stored in tensors.items():
        if names.is_derived(name):
            continue
        with _in_file(stored.file):
            ours = [names.to_kdtune(part) for part in names.parts_of(name)]
        if len(ours) == 1 or not all(part in shapes for part in ours):
            parts = [stored] * len(ours)
        else:
            parts = stored.blocks([shapes[part][0] for part in ours])
        if twice := renamed.keys() & {*ours}:
            raise CheckpointError(
                f"{stored}: {renamed[min(twice)].name!r} is in the files too; one of them is another model's"
            )
        renamed |= zip(ours, parts, strict=True)
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
