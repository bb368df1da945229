"""A model as a Hugging Face folder that transformers loads as it is, its adapters as a PEFT folder that peft loads."""

import json
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from kdtune.checkpoint import peft
from kdtune.checkpoint.atomic import atomic_folder, writing
from kdtune.checkpoint.huggingface import CONFIG, INDEX
from kdtune.checkpoint.sharded import Write, tensor_writer
from kdtune.distributed import is_rank_zero, raise_on_all_ranks, reshard
from kdtune.errors import ConfigError
from kdtune.json_files import read_json
from kdtune.models import Transformer, family_of, has_adapters, merged_config, merged_weights, write_hf_config
from kdtune.paths import user_path

GENERATION_CONFIG = "generation_config.json"
# A model's licence files go with every model made from it.
_LICENCES = ("license*", "licence*", "notice*", "use_policy*", "copying*")
_WEIGHTS = (".safetensors", ".gguf", ".pth", ".bin")

# Saved from a model with adapters: the merged model, the adapters alone, or both, with the adapters in ADAPTER.
SaveWeights = Literal["both", "merged", "adapter"]
ADAPTER = "adapter"


class SupportsSave(Protocol):
    """The tokenizer's methods that are used here."""

    bos_id: int | None
    eos_id: int | None
    pad_id: int
    stop_ids: frozenset[int]

    def trained_stop_ids(self, *, is_chat: bool) -> frozenset[int]:
        """Return the ids that end trained sequences: texts, or conversations where `is_chat`."""
        ...

    def save(self, folder: Path, *, is_chat: bool) -> None:
        """Write its files into a folder, with the chat template where `is_chat`."""
        ...


def save_model(
    model: Transformer,
    folder: str | Path,
    *,
    base: str | Path | None = None,
    tokenizer: SupportsSave | None = None,
    max_shard_bytes: int = 5 * 2**30,
    save_weights: SaveWeights = "merged",
    is_chat: bool = False,
    card: Callable[[Literal["model", "adapter"]], str | None] | None = None,
) -> None:
    """Write the model as a new folder, atomically; see `write_model` and `write_adapter`.

    Args:
        model: stays as it is.
        folder: the new folder.
        base: as in `write_model`.
        tokenizer: writes its own files.
        max_shard_bytes: as in `write_model`.
        save_weights: of a model with adapters: "merged", one model; "adapter", a PEFT folder; "both", the merged model
            with the PEFT folder `adapter` in it. A model without adapters is written as it is.
        is_chat: as in `write_model`.
        card: returns the text of README.md, for the model or for the adapter alone; no README.md without it or if it returns None.

    Raises:
        CheckpointError: the folder exists and holds something, or cannot be written.
        ConfigError: the adapter alone is wanted of a model without adapters.
    """
    adapted = has_adapters(model)
    if save_weights == "adapter" and not adapted:
        raise ConfigError(
            'save_weights="adapter": the model has no adapters; use "merged" or "both", or train with some'
        )
    reshard(model)
    with atomic_folder(folder) as hidden:
        if save_weights == "adapter":
            write_adapter(model, hidden, base=base, tokenizer=tokenizer, is_chat=is_chat)
            _write_card(hidden, card, "adapter")
            return
        write_model(model, hidden, base=base, tokenizer=tokenizer, max_shard_bytes=max_shard_bytes, is_chat=is_chat)
        if save_weights == "both" and adapted:
            with raise_on_all_ranks(), writing(hidden):
                (hidden / ADAPTER).mkdir(exist_ok=True)
            write_adapter(model, hidden / ADAPTER, base=base, tokenizer=tokenizer, is_chat=is_chat)
            _write_card(hidden / ADAPTER, card, "adapter")
        _write_card(hidden, card, "model")


def _write_card(
    folder: Path, card: Callable[[Literal["model", "adapter"]], str | None] | None, kind: Literal["model", "adapter"]
) -> None:
    with raise_on_all_ranks(), writing(folder):
        text = card(kind) if card is not None and is_rank_zero() else None
        if text is not None:
            (folder / "README.md").write_text(text, encoding="utf-8", errors="backslashreplace")


def write_model(
    model: Transformer,
    folder: Path,
    *,
    base: str | Path | None = None,
    tokenizer: SupportsSave | None = None,
    max_shard_bytes: int = 5 * 2**30,
    is_chat: bool = False,
) -> None:
    """Write weights, config, generation config, tokenizer and the base's licence files into an existing folder.

    Args:
        model: its weights are written bit for bit, in their dtype; a tied head is not written twice. Adapters are merged
            in what is written, a tensor at a time, and the model stays as it is.
        folder: such as the hidden folder of `atomic_folder`.
        base: folder or file the model came from; its config's other values, generation config and licences are kept.
        tokenizer: writes its own files. Where the base's files do not stop at what the tokenizer ends trained sequences
            with, or begin with another bos, its special ids take the place of theirs (their eos ids are kept beside).
        max_shard_bytes: a larger model is written in several files with an index.
        is_chat: the model was trained on conversations (`Dataset.is_chat`): what is written carries the chat template, and
            says that an answer ends with the token that the template puts there.

    Raises:
        CheckpointError: the disk is full or cannot be written.
    """
    model_writer(model, base=base, tokenizer=tokenizer, max_shard_bytes=max_shard_bytes, is_chat=is_chat)(folder, None)


def model_writer(
    model: Transformer,
    *,
    base: str | Path | None = None,
    tokenizer: SupportsSave | None = None,
    max_shard_bytes: int = 5 * 2**30,
    is_chat: bool = False,
    staged: bool = False,
) -> Write:
    """Return a function that writes the model as `write_model` does, on all processes together, each its own shards.

    The arguments are those of `write_model`. With `staged`, the current weights are copied to CPU memory, so the model may
    change before they are written.
    """
    weights = file_weights(model)
    planned = _planned(model, weights)
    from huggingface_hub import split_torch_state_dict_into_shards

    split = split_torch_state_dict_into_shards(
        planned, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_bytes
    )
    files = {file: {name: weights[name] for name in names} for file, names in split.filename_to_tensors.items()}
    write_weights = tensor_writer(files, planned, staged=staged)
    describe = description(model, base=base, tokenizer=tokenizer, is_chat=is_chat)

    def write(folder: Path, group: ProcessGroup | None = None) -> None:
        write_weights(folder, group)
        with raise_on_all_ranks(group), writing(folder):
            if is_rank_zero():
                if split.is_sharded:
                    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
                    _write_json(folder / INDEX, index)
                describe(folder)

    return write


def file_weights(model: Transformer) -> dict[str, list[Callable[[], Tensor]]]:
    """Return by name in a Hugging Face file functions that compute the parts of a weight, one below the other, as they would be written."""
    keys = family_of(model.config).hf_keys
    computed = {keys.from_kdtune(name): compute for name, compute in merged_weights(model).items()}
    wholes = dict.fromkeys(map(keys.whole_of, computed))
    return {name: [computed[part] for part in keys.parts_of(name)] for name in wholes}


def description(
    model: Transformer,
    *,
    base: str | Path | None,
    tokenizer: SupportsSave | None,
    is_chat: bool = False,
    quantization: Mapping[str, Any] | None = None,
) -> Callable[[Path], None]:
    """Return a function that writes everything of `write_model` but the weights; `quantization` is the config's `quantization_config`.

    The model is read now: during a forward its weights may have another dtype.
    """
    base = _folder_of(base)
    config = _hf_config(model, base, tokenizer, is_chat)
    if quantization is not None:
        config["quantization_config"] = dict(quantization)

    def write(folder: Path) -> None:
        _write_json(folder / CONFIG, config)
        _write_json(folder / GENERATION_CONFIG, _generation_config(base, tokenizer, is_chat))
        _write_companions(folder, base, tokenizer, is_chat)

    return write


def write_adapter(
    model: Transformer,
    folder: Path,
    *,
    base: str | Path | None = None,
    tokenizer: SupportsSave | None = None,
    is_chat: bool = False,
) -> None:
    """Write the adapters, bit for bit, as a PEFT folder with generation config, tokenizer and licences; the folder exists.

    The arguments are those of `write_model`; `adapter_config.json` names `base` as the adapter's base. Raises
    ConfigError if the model has no adapters, CheckpointError if the disk is full or cannot be written.
    """
    adapter_writer(model, base=base, tokenizer=tokenizer, is_chat=is_chat)(folder, None)


def adapter_writer(
    model: Transformer,
    *,
    base: str | Path | None = None,
    tokenizer: SupportsSave | None = None,
    is_chat: bool = False,
    staged: bool = False,
) -> Write:
    """Return a function that writes as `write_adapter` does, on all processes; `staged` as in `model_writer`."""
    if not has_adapters(model):
        raise ConfigError("the model has no adapters to write; write_model writes it whole")
    tensors = peft.peft_tensors(model, base)
    weights = {peft.WEIGHTS: {name: [tensor.detach] for name, tensor in tensors.items()}}
    write_weights = tensor_writer(weights, tensors, staged=staged)
    config = peft.peft_config(model, base)

    def write(folder: Path, group: ProcessGroup | None = None) -> None:
        write_weights(folder, group)
        with raise_on_all_ranks(group), writing(folder):
            if is_rank_zero():
                _write_json(folder / peft.CONFIG, config)
                _write_json(folder / GENERATION_CONFIG, _generation_config(_folder_of(base), tokenizer, is_chat))
                _write_companions(folder, _folder_of(base), tokenizer, is_chat)

    return write


def _write_companions(folder: Path, base: Path | None, tokenizer: SupportsSave | None, is_chat: bool) -> None:
    own_code = sorted(base.glob("*.py")) if base is not None and _names_own_code(folder) else []
    for file in [*_licence_files(base), *own_code]:
        shutil.copyfile(file, folder / file.name)
    if tokenizer is not None:
        tokenizer.save(folder, is_chat=is_chat)


def _names_own_code(folder: Path) -> bool:
    """Return whether the config.json there is of a model that is computed by code in its own folder."""
    return (folder / CONFIG).is_file() and bool(read_json(folder / CONFIG).get("auto_map"))


def _folder_of(base: str | Path | None) -> Path | None:
    if base is None:
        return None
    path = user_path(base)
    return path.parent if path.is_file() else path


def _planned(model: Transformer, names: Iterable[str]) -> dict[str, Tensor]:
    """Return tensors of the weights' shapes and dtypes that take no memory: merging is deferred until a shard is written."""
    state = model.state_dict()
    keys = family_of(model.config).hf_keys
    parts = {name: [state[keys.to_kdtune(part)] for part in keys.parts_of(name)] for name in names}
    return {
        name: torch.empty((sum(map(len, of_name)), *of_name[0].shape[1:]), dtype=of_name[0].dtype, device="meta")
        for name, of_name in parts.items()
    }


def _hf_config(model: Transformer, base: Path | None, tokenizer: SupportsSave | None, is_chat: bool) -> dict[str, Any]:
    dtype = str(model.dtype).removeprefix("torch.")
    of_base = read_json(base / CONFIG) if base is not None and (base / CONFIG).is_file() else None
    if tokenizer is not None:
        if of_base is None:
            of_base = _special_ids(tokenizer) | {"eos_token_id": tokenizer.eos_id}
        else:
            of_base = _with_trained_ids(of_base, tokenizer, is_chat)
    return write_hf_config(merged_config(model), base=of_base, dtype=dtype)


def _generation_config(base: Path | None, tokenizer: SupportsSave | None, is_chat: bool) -> dict[str, Any]:
    if base is not None and (base / GENERATION_CONFIG).is_file():
        kept = read_json(base / GENERATION_CONFIG)
        kept.pop("transformers_version", None)
        return kept if tokenizer is None else _with_trained_ids(kept, tokenizer, is_chat)
    return {"_from_model_config": False} | (_special_ids(tokenizer) if tokenizer is not None else {})


def _special_ids(tokenizer: SupportsSave, stop_ids: Collection[int] | None = None) -> dict[str, Any]:
    # The tokenizer's own eos comes first: readers that want a single one take the first.
    found = sorted(tokenizer.stop_ids if stop_ids is None else stop_ids, key=lambda i: (i != tokenizer.eos_id, i))
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": found[0] if len(found) == 1 else found or None,
        "pad_token_id": tokenizer.pad_id,
    }


def _with_trained_ids(document: dict[str, Any], tokenizer: SupportsSave, is_chat: bool) -> dict[str, Any]:
    """Return the base's document with the tokenizer's special ids if its own differ from what was trained.

    A document with the tokenizer's bos that already stops at the ids that end trained sequences is unchanged. Otherwise
    the ids that it stops at are kept in addition.
    """
    listed = document.get("eos_token_id")
    stops = {i for i in (listed if isinstance(listed, list) else [listed]) if isinstance(i, int)}
    bos = document.get("bos_token_id")
    other_bos = bos is not None and tokenizer.bos_id is not None and bos != tokenizer.bos_id
    trained = tokenizer.trained_stop_ids(is_chat=is_chat)
    if trained <= stops and not other_bos:
        return document
    own = _special_ids(tokenizer, stops | trained)
    return {**document, **{key: value for key, value in own.items() if value is not None}}


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
