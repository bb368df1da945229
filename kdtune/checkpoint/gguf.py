"""GGUF files: metadata, and tensors dequantized a few rows at a time."""

import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, ReaderTensor, dequantize
from torch import Tensor

from kdtune.checkpoint.tensors import StoredTensor
from kdtune.errors import CheckpointError

# Dequantized at once: enough to be fast, negligible compared to the weights.
_PIECE_BYTES = 32 * 2**20
_DTYPES = {
    GGMLQuantizationType.F64: torch.float64,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}


def gguf_files(folder: Path) -> list[Path]:
    """Return the folder's GGUF files in order; the list may be empty."""
    return sorted(folder.glob("*.gguf"))


class _TensorReader(GGUFReader):
    """The gguf package's reader without the arrays in the metadata, for which it makes a NumPy view of every vocabulary entry.

    Opening SmolLM2 takes 0.1 s instead of 4 s. `kdtune.tokenizers.gguf_metadata` reads the metadata.
    """

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[GGUFValueType]]:
        if raw_type != GGUFValueType.ARRAY or self.byte_order != "I":
            return super()._get_field_parts(orig_offs, raw_type)
        kind = GGUFValueType(int(self._get(orig_offs, np.uint32)[0]))
        count = int(self._get(orig_offs + 4, np.uint64)[0])
        end = orig_offs + 12
        if kind == GGUFValueType.STRING:
            lengths = self.data.data
            for _ in range(count):
                end += 8 + struct.unpack_from("=Q", lengths, end)[0]
        elif kind == GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        else:
            end += count * np.dtype(self.gguf_scalar_to_np[kind]).itemsize
        return end - orig_offs, [], [], [GGUFValueType.ARRAY, kind]


def _open(file: Path) -> GGUFReader:
    """Open a file's tensor table; the tensor data stays on disk.

    Raises:
        CheckpointError: the file is missing, cut off, not a GGUF file, or one part of a split model.
    """
    try:
        reader = _TensorReader(file)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: missing; download it again") from error
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from error
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError, struct.error) as error:
        raise CheckpointError(
            f"{file}: not a whole GGUF file: {error}; it is cut off or corrupt: download it again"
        ) from error
    parts = reader.get_field("split.count")
    if parts is not None and parts.contents() > 1:
        raise CheckpointError(
            f"{file}: split.count={parts.contents()}: one part of a split model; join the parts with llama.cpp's "
            "llama-gguf-split --merge"
        )
    return reader


def stored_tensors(file: Path) -> dict[str, StoredTensor]:
    """Return the file's tensors by their GGUF names, unread. Quantized ones read as float32.

    Raises:
        CheckpointError: the file is missing, cut off, not a GGUF file, or one part of a split model.
    """
    found = {}
    for tensor in _open(file).tensors:
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
        # Unquantized values are a read-only view of the file, which torch does not know: those are copied.
        owned = values if values.flags.writeable else values.copy()
        yield torch.from_numpy(owned.reshape(-1, *shape[1:])).to(dtype)
