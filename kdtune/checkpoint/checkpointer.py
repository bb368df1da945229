"""Read a model from a folder or GGUF file in any supported format: problems, config, weights."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdtune.checkpoint import gguf, huggingface, meta, peft, quantized
from kdtune.checkpoint.fingerprint import file_fingerprints
from kdtune.checkpoint.huggingface import NO_PICKLES, PICKLES
from kdtune.checkpoint.tensors import StoredModel, StoredTensor, check_num_layers, check_tensors, fill_model
from kdtune.distributed import is_sharded
from kdtune.errors import CheckpointError
from kdtune.gguf_file import read_gguf
from kdtune.model_files import read_json
from kdtune.models import Transformer, TransformerConfig, weight_shapes
from kdtune.models.llama import configs, convert
from kdtune.paths import user_path

_FORMATS = {".safetensors": "huggingface", ".gguf": "gguf", ".pth": "meta"}


def load_model(
    folder: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Transformer:
    """Load the model of a Hugging Face folder, a folder of Meta's files, or a GGUF file (or a folder with one).

    Args:
        folder: The folder or file.
        dtype: dtype of the weights in memory; None: the stored dtype of most of them (float32 for a quantized GGUF).
        device: Where the weights go, one tensor at a time.

    Raises:
        CheckpointError: A file is missing, damaged or of an unsupported model; the file and tensor are named.
    """
    return Checkpointer(folder).load(dtype=dtype, device=device)


class Checkpointer:
    """Reads a model from a folder, or from a GGUF file.

    Args:
        checkpoint_dir: The folder, or a single file in it.
        checkpoint_files: Names of the weight files in it, of one format. None: found by looking, safetensors before
            GGUF before Meta's consolidated.NN.pth.
        adapter_dir: A PEFT folder with an adapter for that model. `load` merges it into the weights; if the given model has
            adapters, `load` fills those instead.

    Nothing is read until a method asks for it.
    """

    def __init__(
        self,
        checkpoint_dir: str | Path,
        checkpoint_files: Sequence[str] | None = None,
        adapter_dir: str | Path | None = None,
    ) -> None:
        path = user_path(checkpoint_dir)
        if path.is_file():
            if checkpoint_files is not None:
                raise CheckpointError(
                    f"{path}: is a file, and checkpoint_files={list(checkpoint_files)} is given too; "
                    "give its folder as checkpoint_dir, or leave out checkpoint_files"
                )
            path, checkpoint_files = path.parent, [path.name]
        if checkpoint_files is not None and (
            isinstance(checkpoint_files, str) or not isinstance(checkpoint_files, Sequence) or not checkpoint_files
        ):
            raise CheckpointError(
                f"checkpoint_files={checkpoint_files!r}: a list of file names expected; leave it out to have them found"
            )
        self.checkpoint_dir = path
        self.adapter_dir = None if adapter_dir is None else user_path(adapter_dir)
        self._named_files = checkpoint_files

    def problems(self) -> list[str]:
        """One sentence for each thing that keeps the model from loading; reads no weights, only what describes them."""
        try:
            files = self.files()
        except CheckpointError as error:
            return [str(error)]
        described_by = {"huggingface": huggingface.CONFIG, "quantized": huggingface.CONFIG, "meta": meta.PARAMS}.get(
            _format(files[0])
        )
        needed = [*files, *([files[0].parent / described_by] if described_by else [])]
        missing = [f"{file}: missing; download it again" for file in needed if not os.path.isfile(file)]
        if missing:
            return missing
        try:
            if _format(files[0]) == "quantized":
                self._refuse_adapter(files[0])
                quantized.check(files[0])
                return []
            config = self._read().config
            if self.adapter_dir is not None:
                peft.check_adapter(peft.read_adapter(self.adapter_dir), _on_meta(config))
        except CheckpointError as error:
            return [str(error)]
        return []

    def files(self) -> list[Path]:
        """Return the weight files, in order; those named by the user or by an index may be missing.

        Raises:
            CheckpointError: the folder is missing or holds no weights that are supported, or more than one model.
        """
        folder = self.checkpoint_dir
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder}: no such folder; give one that holds a model: kdtune download gets one, and the top of a shipped "
                "config (kdtune cat NAME) says which commands make its folders"
            )
        if self._named_files is not None:
            return _named(folder, self._named_files)
        if found := huggingface.weight_files(folder):
            return found
        if found := quantized.weight_files(folder):
            return found
        if found := gguf.gguf_files(folder):
            if len(found) > 1:
                names = ", ".join(file.name for file in found)
                raise CheckpointError(f"{folder}: {len(found)} GGUF files ({names}); name one in checkpoint_files")
            return found
        if found := meta.weight_files(folder):
            return found
        _refuse_other_weights(folder)
        raise CheckpointError(
            f"{folder}: no weights found; model.safetensors (or shards with {huggingface.INDEX}), a .gguf file or "
            "consolidated.00.pth expected: download the model again"
        )

    def model_config(self) -> TransformerConfig:
        """Return the config of the stored model; reads no weights. Weights stored beside it must have its shapes.

        Raises:
            CheckpointError: it is missing, damaged, of an unsupported model, or of another one than the weights.
        """
        files = self.files()
        if _format(files[0]) == "quantized":
            return quantized.check(files[0]) if files[0].is_file() else quantized.read_config(files[0].parent)
        if _format(files[0]) == "huggingface" and not all(map(os.path.isfile, files)):
            return _hf_config(files[0].parent)
        return self._read().config

    def fingerprint(self) -> dict[str, Any]:
        """Return the model's config, and size and hash of each weight file: equal for equal weights.

        See `kdtune.checkpoint.fingerprint` for what is read of large files.

        Raises:
            CheckpointError: the model is missing or cannot be read.
        """
        named = {file.name: file for file in self.files()}
        if self.adapter_dir is not None:
            named |= {f"adapter_dir/{name}": self.adapter_dir / name for name in (peft.CONFIG, peft.WEIGHTS)}
        return {
            "config": asdict(self.model_config()),
            **dict(zip(named, file_fingerprints(list(named.values())), strict=True)),
        }

    def load(
        self,
        model: Transformer | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> Transformer:
        """Load the stored weights in `dtype` (None: as stored) on `device` and return the model.

        A given `model` is filled in place; on the meta device it takes no memory until then. It must be the model that the
        folder describes, except for the context length. Its adapters are loaded from `adapter_dir`, or freshly initialized
        without one. If the model has no adapters, that adapter is merged; a tied head that it adapts is then untied.

        Raises:
            CheckpointError: model, folder and adapter disagree, or a file is missing or damaged; field, file or tensor
                is named.
        """
        files = self.files()
        if _format(files[0]) == "quantized":
            self._refuse_adapter(files[0])
            stored_config = quantized.check(files[0])
            if model is not None:
                self._check_same(model.config, stored_config)
                self._refuse_shards(model)
            return quantized.fill_model(model or _on_meta(stored_config), files[0], dtype=dtype, device=device)
        stored = self._read()
        if model is None:
            model = _on_meta(stored.config)
        else:
            self._check_same(model.config, stored.config)
        if self.adapter_dir is None:
            return fill_model(model, stored, dtype=dtype, device=device)
        adapter = peft.read_adapter(self.adapter_dir)
        peft.check_adapter(adapter, model)
        return peft.fill_adapter(fill_model(model, stored, dtype=dtype, device=device), adapter)

    def _refuse_adapter(self, file: Path) -> None:
        if self.adapter_dir is not None:
            raise CheckpointError(
                f"{file}: holds quantized weights, into which adapter_dir={self.adapter_dir} cannot be merged; give the "
                "unquantized model as checkpoint_dir, or merge first and quantize then"
            )

    def _refuse_shards(self, model: Transformer) -> None:
        if is_sharded(model.parameters()):
            raise CheckpointError(
                f"{self.checkpoint_dir}: holds quantized weights, which cannot be sharded; a teacher can be a copy on each process "
                "(teacher_parallelism=kdtune.distributed.Parallelism teacher_parallelism.dp_shard=1 "
                "teacher_parallelism.dp_replicate=-1), a student is trained from unquantized weights"
            )

    def _read(self) -> StoredModel:
        """Read the checkpoint's description and check it against the tensor headers."""
        files = self.files()
        stored = _READERS[_format(files[0])](files)
        check_tensors(stored.config, stored)
        return stored

    def _check_same(self, given: TransformerConfig, stored: TransformerConfig) -> None:
        silent = {"max_seq_len"}
        if _format(self.files()[0]) == "meta":
            # params.json contains neither whether the head is tied nor the factor of a scaled RoPE.
            silent.add("tie_embeddings")
            if given.rope_scaling is not None and stored.rope_scaling is not None:
                silent.add("rope_scaling")
        names = [field.name for field in fields(given) if field.name not in silent]
        different = [name for name in names if getattr(given, name) != getattr(stored, name)]
        if different:
            listed = [f"{name}={getattr(given, name)!r}, stored {getattr(stored, name)!r}" for name in different]
            raise CheckpointError(
                f"{self.checkpoint_dir}: holds another model than the config's `model`: {'; '.join(listed)}; "
                "use the builder of this model, or the folder of that one"
            )


def _on_meta(config: TransformerConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(config)


def _format(file: Path) -> str:
    return "quantized" if file.name == quantized.WEIGHTS else _FORMATS[file.suffix]


def _named(folder: Path, names: Sequence[str]) -> list[Path]:
    files = [folder / name for name in names]
    suffixes = {file.suffix for file in files}
    if pickled := [file for file in files if file.suffix in PICKLES]:
        raise CheckpointError(f"{pickled[0]}: {NO_PICKLES}")
    if len(suffixes) != 1 or not suffixes <= _FORMATS.keys():
        raise CheckpointError(
            f"checkpoint_files={list(names)}: the files of one model in one of {', '.join(_FORMATS)} expected; "
            "leave checkpoint_files out to have them found"
        )
    if suffixes == {".gguf"} and len(files) > 1:
        raise CheckpointError(f"checkpoint_files={list(names)}: one GGUF file expected")
    return files


def _refuse_other_weights(folder: Path) -> None:
    if peft.is_adapter_folder(folder):
        raise CheckpointError(
            f"{folder}: holds an adapter, not a model; give the model that it was trained on (base_model_name_or_path in its "
            f"{peft.CONFIG}) as checkpoint_dir, and this folder as adapter_dir"
        )
    names = sorted(file.name for file in folder.iterdir() if file.is_file())
    if pickled := [name for name in names if name.endswith(PICKLES) or name == "pytorch_model.bin.index.json"]:
        raise CheckpointError(f"{folder / pickled[0]}: {NO_PICKLES}")
    if loose := [name for name in names if name.endswith(".safetensors")]:
        raise CheckpointError(
            f"{folder}: {loose[0]} found, but neither {huggingface.WEIGHTS} nor {huggingface.INDEX}; download the "
            "index too, or name the files in checkpoint_files"
        )


@contextmanager
def _in_file(path: Path) -> Iterator[None]:
    """Prefix the path to the message of an error that knows only the tensor or setting."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {str(error).removeprefix(path.name + ': ')}") from error


def _hf_config(folder: Path) -> TransformerConfig:
    path = folder / huggingface.CONFIG
    document = read_json(path)
    with _in_file(path):
        return configs.config_from_hf(document)


def _read_huggingface(files: list[Path]) -> StoredModel:
    folder = files[0].parent
    config = _hf_config(folder)
    index = huggingface.read_index(folder) if (folder / huggingface.INDEX).is_file() else None
    if index is not None and set(index.values()) != {file.name for file in files}:
        index = None
    tensors = huggingface.stored_tensors(files, index)
    # Saved from a model without head (LlamaModel), whose names lack the part before the layers.
    prefix = "" if any(name.startswith("model.") for name in tensors) else "model."
    renamed = {name if name.startswith("lm_head.") else prefix + name: stored for name, stored in tensors.items()}
    return StoredModel(
        config, _by_our_names(renamed, convert.HF), lambda name: convert.kdtune_to_hf(name).removeprefix(prefix)
    )


def _read_meta(files: list[Path]) -> StoredModel:
    path = files[0].parent / meta.PARAMS
    params = read_json(path)
    parts = meta.load_parts(files)
    is_tied = convert.kdtune_to_meta("output.weight") not in parts[0]
    embedding = parts[0].get(convert.kdtune_to_meta("tok_embeddings.weight"))
    # Llama 2's params.json leaves the vocabulary to the tokenizer; its parts are cut along the other dimension.
    rows = None if embedding is None else len(embedding)
    with _in_file(path):
        config = configs.config_from_meta(params, vocab_size=rows, tie_embeddings=True if is_tied else None)
    check_num_layers(config, len(parts[0]), path.parent)
    shapes = {convert.kdtune_to_meta(name): shape for name, shape in weight_shapes(config).items()}
    tensors = _by_our_names(meta.stored_tensors(files, parts, shapes), convert.META)
    return StoredModel(config, _unpermuted(tensors, config), convert.kdtune_to_meta)


def _read_gguf(files: list[Path]) -> StoredModel:
    file = files[0]
    header = read_gguf(file)
    stored = gguf.stored_tensors(file, header)
    embedding = stored.get(convert.kdtune_to_gguf("tok_embeddings.weight"))
    if embedding is not None:
        header.metadata.setdefault("llama.vocab_size", embedding.shape[0])
    factors = stored.get(convert.GGUF_ROPE_FACTORS)
    with _in_file(file):
        config = configs.config_from_gguf(
            header.metadata,
            tie_embeddings=convert.kdtune_to_gguf("output.weight") not in stored,
            rope_factors=factors.read() if factors else None,
        )
    tensors = _unpermuted(_by_our_names(stored, convert.GGUF), config)
    return StoredModel(config, tensors, convert.kdtune_to_gguf)


_READERS = {"huggingface": _read_huggingface, "meta": _read_meta, "gguf": _read_gguf}


def _by_our_names(tensors: dict[str, StoredTensor], names: convert.KeyMap) -> dict[str, StoredTensor]:
    renamed = {}
    for name, stored in tensors.items():
        if names.is_derived(name):
            continue
        with _in_file(stored.file):
            renamed[names.to_kdtune(name)] = stored
    return renamed


def _unpermuted(tensors: dict[str, StoredTensor], config: TransformerConfig) -> dict[str, StoredTensor]:
    """Return the tensors with q and k in our row order; Meta and GGUF interleave the two halves of each rotary pair."""
    result = {}
    for name, stored in tensors.items():
        heads = convert.rotary_heads(name, config)
        result[name] = (
            stored if heads is None else replace(stored, pieces=partial(_unpermuted_pieces, stored, heads), part=None)
        )
    return result


def _unpermuted_pieces(stored: StoredTensor, num_heads: int) -> Iterator[Tensor]:
    yield convert.unpermute(stored.read(), num_heads)
