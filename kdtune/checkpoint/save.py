"""A model as a Hugging Face folder that transformers loads as it is."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from kdtune.checkpoint.atomic import atomic_folder, writing
from kdtune.checkpoint.huggingface import CONFIG, INDEX, read_json
from kdtune.models import Transformer
from kdtune.models.llama import configs, convert

GENERATION_CONFIG = "generation_config.json"
# The terms a model comes under travel with what is made from it.
_LICENCES = ("license*", "licence*", "notice*", "use_policy*", "copying*")
_WEIGHTS = (".safetensors", ".gguf", ".pth", ".bin")


class SavesItself(Protocol):
    """What a tokenizer offers here."""

    bos_id: int | None
    eos_id: int | None
    pad_id: int
    stop_ids: frozenset[int]

    def save(self, folder: Path) -> None:
        """Writes its files into a folder."""
        ...


def save_model(
    model: Transformer,
    folder: str | Path,
    *,
    base: str | Path | None = None,
    tokenizer: SavesItself | None = None,
    max_shard_bytes: int = 5 * 2**30,
) -> None:
    """Writes the model as a new folder, atomically; see `write_model`.

    Raises:
        CheckpointError: the folder exists and holds something, or cannot be written.
    """
    with atomic_folder(folder) as hidden:
        write_model(model, hidden, base=base, tokenizer=tokenizer, max_shard_bytes=max_shard_bytes)


def write_model(
    model: Transformer,
    folder: Path,
    *,
    base: str | Path | None = None,
    tokenizer: SavesItself | None = None,
    max_shard_bytes: int = 5 * 2**30,
) -> None:
    """Writes weights, config, generation config, tokenizer and the base's licence files into a folder that exists.

    Args:
        model: its weights are written bit for bit, in their dtype; a tied head is not written twice.
        folder: such as the hidden folder of `atomic_folder`.
        base: folder or file the model came from; its config's other values, generation config and licences are kept.
        tokenizer: writes its own files.
        max_shard_bytes: a larger model is written in several files with an index.

    Raises:
        CheckpointError: the disk is full or cannot be written.
    """
    base = _folder_of(base)
    with writing(folder):
        _write_weights(_hf_state_dict(model), folder, max_shard_bytes)
        _write_json(folder / CONFIG, _hf_config(model, base, tokenizer))
        _write_json(folder / GENERATION_CONFIG, _generation_config(base, tokenizer))
        for file in _licence_files(base):
            shutil.copyfile(file, folder / file.name)
        if tokenizer is not None:
            tokenizer.save(folder)


def _folder_of(base: str | Path | None) -> Path | None:
    if base is None:
        return None
    path = Path(base).expanduser()
    return path.parent if path.is_file() else path


def _hf_state_dict(model: Transformer) -> dict[str, Tensor]:
    names = [name for name in model.state_dict() if not (model.config.tie_embeddings and name == "output.weight")]
    state = model.state_dict()
    return {convert.kdtune_to_hf(name): state[name].detach().contiguous() for name in names}


def _write_weights(tensors: Mapping[str, Tensor], folder: Path, max_shard_bytes: int) -> None:
    split = split_torch_state_dict_into_shards(
        dict(tensors), filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_bytes
    )
    for file, names in split.filename_to_tensors.items():
        # One shard at a time on the CPU: a model on a GPU is never copied whole.
        save_file({name: tensors[name].cpu() for name in names}, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        _write_json(folder / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})


def _hf_config(model: Transformer, base: Path | None, tokenizer: SavesItself | None) -> dict[str, Any]:
    dtype = str(model.tok_embeddings.weight.dtype).removeprefix("torch.")
    of_base = read_json(base / CONFIG) if base is not None and (base / CONFIG).is_file() else None
    if of_base is None and tokenizer is not None:
        of_base = _special_ids(tokenizer) | {"eos_token_id": tokenizer.eos_id}
    return configs.config_to_hf(model.config, base=of_base, dtype=dtype)


def _generation_config(base: Path | None, tokenizer: SavesItself | None) -> dict[str, Any]:
    if base is not None and (base / GENERATION_CONFIG).is_file():
        kept = read_json(base / GENERATION_CONFIG)
        kept.pop("transformers_version", None)
        return kept
    return {"_from_model_config": False} | (_special_ids(tokenizer) if tokenizer is not None else {})


def _special_ids(tokenizer: SavesItself) -> dict[str, Any]:
    stop_ids = sorted(tokenizer.stop_ids)
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": stop_ids[0] if len(stop_ids) == 1 else stop_ids or None,
        "pad_token_id": tokenizer.pad_id,
    }


def _licence_files(base: Path | None) -> list[Path]:
    if base is None or not base.is_dir():
        return []
    return sorted(
        file
        for file in base.iterdir()
        if file.is_file()
        and file.suffix not in _WEIGHTS
        and any(Path(file.name.lower()).match(pattern) for pattern in _LICENCES)
    )


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")
