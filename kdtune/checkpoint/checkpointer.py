"""Read a model from a folder or GGUF file in any supported format: problems, config, weights."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kdtune import gguf_file
from kdtune.checkpoint import huggingface, meta, peft, quantized, readers
from kdtune.checkpoint.huggingface import NO_PICKLES, PICKLES
from kdtune.checkpoint.tensors import LazyModel, check_tensors, fill_model
from kdtune.distributed import is_sharded
from kdtune.errors import CheckpointError
from kdtune.log import get_logger
from kdtune.models import Family, Transformer, TransformerConfig, new_model, on_meta_device
from kdtune.paths import user_path

_log = get_logger(__name__)

_FORMATS = {".safetensors": "huggingface", ".gguf": "gguf", ".pth": "meta"}
_READERS = {"huggingface": readers.read_huggingface, "meta": readers.read_meta, "gguf": readers.read_gguf}


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
        family: Family of the model, in a config by its dotted path, such as my_qwen.QWEN2; None: one of kdtune's, found in the
            files, or that of the model that `load` is given.

    Nothing is read until a method asks for it.
    """

    def __init__(
        self,
        checkpoint_dir: str | Path,
        checkpoint_files: Sequence[str] | None = None,
        adapter_dir: str | Path | None = None,
        family: Family | None = None,
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
        self.family = family
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
                quantized.check(files[0], self.family)
                return []
            config = self._read(self.family).config
            if self.adapter_dir is not None:
                peft.check_adapter(peft.read_adapter(self.adapter_dir, config), _on_meta(config))
        except CheckpointError as error:
            return [str(error)]
        return []

    def files(self) -> list[Path]:
        """Return the weight files, in order; those named by the user or by an index may be missing.

        CheckpointError if the folder is missing or holds no weights that are supported, or more than one model.
        """
        folder = self.checkpoint_dir
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder}: no such folder; give one that holds a model: kdtune download gets one, and the top of a shipped "
                "config (kdtune cat NAME) says which commands make its folders"
            )
        if self._named_files is not None:
            return _named(folder, self._named_files)
        for kind in (huggingface, quantized, gguf_file, meta):
            if found := kind.weight_files(folder):
                return found
        _refuse_other_weights(folder)
        raise CheckpointError(
            f"{folder}: no weights found; model.safetensors (or shards with {huggingface.INDEX}), a .gguf file or "
            "consolidated.00.pth expected: download the model again"
        )

    @property
    def is_quantized(self) -> bool:
        """Return whether it is a folder of quantized weights, which `kdtune run quantize` wrote."""
        return _format(self.files()[0]) == "quantized"

    def model_config(self) -> TransformerConfig:
        """Return the config of the stored model; reads no weights. Weights stored beside it must have its shapes.

        Raises:
            CheckpointError: it is missing, damaged, of an unsupported model, or of another one than the weights.
        """
        files = self.files()
        if _format(files[0]) == "quantized":
            folder = files[0].parent
            return (
                quantized.check(files[0], self.family)
                if files[0].is_file()
                else quantized.read_config(folder, self.family)
            )
        if _format(files[0]) == "huggingface" and not all(map(os.path.isfile, files)):
            return readers.hf_config(files[0].parent, self.family)
        return self._read(self.family).config

    def fingerprint(self) -> dict[str, Any]:
        """Return the model's config, and size and hash of each weight file: equal for equal weights.

        See `file_fingerprints` for what is read of large files.

        Raises:
            CheckpointError: the model is missing or cannot be read.
        """
        named = {file.name: file for file in self.files()}
        if self.adapter_dir is not None:
            named |= {f"adapter_dir/{name}": self.adapter_dir / name for name in (peft.CONFIG, peft.WEIGHTS)}
        return {
            "config": self.model_config().described(),
            **dict(zip(named, file_fingerprints(list(named.values())), strict=True)),
        }

    def load(
        self,
        model: Transformer | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        quantization: str | None = None,
    ) -> Transformer:
        """Load the stored weights in `dtype` (None: as stored) on `device` and return the model.

        A given `model` is filled in place; on the meta device it takes no memory until then. It must be the model that the
        folder describes, except for the context length. Its adapters are loaded from `adapter_dir`, or freshly initialized
        without one. If the model has no adapters, that adapter is merged; a tied head that it adapts is then untied.

        `quantization`, a scheme of `kdtune.models.quantization`, quantizes the linears of a model without adapters as they
        are read, one by one, after an adapter is merged: the unquantized model is never in memory as a whole.

        Raises:
            CheckpointError: model, folder and adapter disagree, or a file is missing or damaged; field, file or tensor
                is named.
        """
        files = self.files()
        family = self.family or (model.config.family if model is not None else None)
        if _format(files[0]) == "quantized":
            self._refuse_adapter(files[0])
            if quantization:
                raise CheckpointError(f"{files[0]}: holds weights that are quantized already; leave {quantization} out")
            stored_config = quantized.check(files[0], family)
            if model is not None:
                self._check_same(model.config, stored_config)
                self._refuse_shards(model)
            return quantized.fill_model(model or _on_meta(stored_config), files[0], dtype=dtype, device=device)
        stored = self._read(family)
        if stored.skipped:
            parts = " and ".join(f"{count} tensors of {part}" for part, count in stored.skipped.items())
            _log.info("%s: the text model alone is read; %s are skipped", self.checkpoint_dir, parts)
        if model is None:
            model = _on_meta(stored.config)
        else:
            self._check_same(model.config, stored.config)
        fill = partial(fill_model, model, stored, dtype=dtype, device=device, quantization=quantization)
        if self.adapter_dir is None:
            return fill()
        adapter = peft.read_adapter(self.adapter_dir, model.config)
        peft.check_adapter(adapter, model)
        return peft.fill_adapter(fill(merge=adapter.merge if quantization else None), adapter)

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

    def _read(self, family: Family | None) -> LazyModel:
        """Read the checkpoint's description and check it against the tensor headers."""
        files = self.files()
        stored = _READERS[_format(files[0])](files, family)
        check_tensors(stored.config, stored)
        return stored

    def _check_same(self, given: TransformerConfig, stored: TransformerConfig) -> None:
        silent = {"max_seq_len"}
        if _format(self.files()[0]) == "meta":
            # params.json contains neither whether the head is tied nor the factor of a scaled RoPE.
            silent.add("tie_embeddings")
            if given.rope_scaling is not None and stored.rope_scaling is not None:
                silent.add("rope_scaling")
        if given.family is None:  # a builder that names none
            silent.add("family")
        names = [field.name for field in fields(given) if field.name not in silent]
        different = [name for name in names if getattr(given, name) != getattr(stored, name)]
        if different:
            listed = [f"{name}={getattr(given, name)!r}, stored {getattr(stored, name)!r}" for name in different]
            raise CheckpointError(
                f"{self.checkpoint_dir}: holds another model than the config's `model`: {'; '.join(listed)}; "
                "use the builder of this model, or the folder of that one"
            )


def _on_meta(config: TransformerConfig) -> Transformer:
    with on_meta_device():
        return new_model(config)


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


# Files of this size together are read whole. Of more, each is read in blocks: those at its ends, where its names and shapes are,
# and one in every so many bytes, so that a large tensor has a block of its own.
WHOLE_BYTES = 2**28
BLOCK_BYTES = 2**16
STRIDE_BYTES = 2**22
_CHUNK_BYTES = 2**20


def file_fingerprints(files: Sequence[Path]) -> list[str]:
    """Return size and SHA-256 (the first 64 bits) of each file; of a large file, only blocks spread over it are hashed.

    Blocks detect another model, another finetune of it and another quantization. They may miss a few numbers changed by
    hand in a model of more than WHOLE_BYTES.

    Raises:
        CheckpointError: a file cannot be read.
    """
    try:
        sizes = [file.stat().st_size for file in files]
        return [
            _fingerprint(file, size, whole=sum(sizes) <= WHOLE_BYTES) for file, size in zip(files, sizes, strict=True)
        ]
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read: {error.strerror}") from error


def _fingerprint(path: Path, size: int, *, whole: bool) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        if whole or size <= STRIDE_BYTES:
            while chunk := file.read(_CHUNK_BYTES):
                found.update(chunk)
        else:
            found.update(file.read(_CHUNK_BYTES))
            for start in (*range(STRIDE_BYTES, size, STRIDE_BYTES), size - BLOCK_BYTES):
                file.seek(start)
                found.update(file.read(BLOCK_BYTES))
    return f"{size:,} bytes, {found.hexdigest()[:16]}"
