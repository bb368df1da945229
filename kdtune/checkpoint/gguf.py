"""GGUF files: metadata, and tensors dequantized a few rows at a time."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor, dequantize
from torch import Tensor

from kdtune.checkpoint.tensors import StoredTensor
from kdtune.errors import CheckpointError

# Dequantized at once: enough to be fast, too little to count beside the weights.
_PIECE_BYTES = 32 * 2**20
_DTYPES = {
    GGMLQuantizationType.F64: torch.float64,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}


def gguf_files(folder: Path) -> list[Path]:
    """The folder's GGUF files in order, maybe none."""
    return sorted(folder.glob("*.gguf"))


def open_gguf(file: Path) -> GGUFReader:
    """The file's metadata and tensor table; tensor data stays on disk.

    Raises:
        CheckpointError: the file is missing, cut off, not a GGUF file, or one part of a split model.
    """
    try:
        reader = GGUFReader(file)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: missing; download it again") from error
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from error
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
        raise CheckpointError(f"{file}: not a whole GGUF file: {error}; it is cut off or corrupt: download it again") from error
    parts = reader.get_field("split.count")
    if parts is not None and parts.contents() > 1:
        raise CheckpointError(
            f"{file}: split.count={parts.contents()}: one part of a split model; join the parts with llama.cpp's "
            "llama-gguf-split --merge"
        )
    return reader


def metadata(reader: GGUFReader) -> dict[str, Any]:
    """The metadata by key as plain Python values, without the vocabulary."""
    large = ("tokenizer.ggml.tokens", "tokenizer.ggml.scores", "tokenizer.ggml.token_type", "tokenizer.ggml.merges")
    return {key: field.contents() for key, field in reader.fields.items() if key not in large}


def stored_tensors(file: Path, reader: GGUFReader) -> dict[str, StoredTensor]:
    """The file's tensors by GGUF's names, unread. Quantized ones read as float32."""
    found = {}
    for tensor in reader.tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        dtype = _DTYPES.get(tensor.tensor_type, torch.float32)
        found[tensor.name] = StoredTensor(file, tensor.name, shape, dtype, partial(_pieces, file, tensor, shape, dtype))
    return found


def _pieces(file: Path, tensor: ReaderTensor, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Tensor]:
    row_bytes = 4 * int(np.prod(shape[1:], dtype=np.int64))
    rows = max(1, _PIECE_BYTES // max(1, row_bytes))
    for start in range(0, shape[0], rows):
        data = tensor.data[start : start + rows]
        try:
            # F64 has no entry in the library's table and needs none.
            values = data if dtype is torch.float64 else dequantize(data, tensor.tensor_type)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{file}: tensor {tensor.name!r}: type {tensor.tensor_type.name} cannot be dequantized; "
                "use a file in F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1 or a K quantization"
            ) from error
        yield torch.from_numpy(np.ascontiguousarray(values).reshape(-1, *shape[1:])).to(dtype)
