"""Tensors of GGUF files, dequantized a few rows at a time."""

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
from torch import Tensor

from kdtune.checkpoint.tensors import LazyTensor
from kdtune.errors import CheckpointError
from kdtune.gguf_file import GGUFHeader, GGUFTensor

# Dequantized at once: enough to be fast, negligible compared to the weights.
_PIECE_BYTES = 32 * 2**20
_DTYPES = {
    GGMLQuantizationType.F64: torch.float64,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}


def stored_tensors(file: Path, header: GGUFHeader) -> dict[str, LazyTensor]:
    """Return the file's tensors by their GGUF names, unread. Quantized ones read as float32.

    Raises:
        CheckpointError: the file is one part of a split model, or its tensors do not fit in it.
    """
    if (parts := header.metadata.get("split.count", 1)) not in (0, 1):
        raise CheckpointError(
            f"{file}: split.count={parts}: one part of a split model; join the parts with llama.cpp's "
            "llama-gguf-split --merge"
        )
    size = file.stat().st_size
    found = {}
    for name, tensor in header.tensors.items():
        try:
            kind = GGMLQuantizationType(tensor.kind)
            rows, row_bytes = _rows(tensor, kind)
            if (end := tensor.start + rows * row_bytes) > size:
                raise ValueError(f"it ends at byte {end} of {size}")
        except ValueError as error:
            raise CheckpointError(
                f"{file}: not a whole GGUF file: tensor {name!r}: {error}; it is cut off or corrupt: download it again"
            ) from error
        dtype = _DTYPES.get(kind, torch.float32)
        found[name] = LazyTensor(file, name, tensor.shape, dtype, partial(_pieces, file, name, tensor, dtype))
    return found


def _rows(tensor: GGUFTensor, kind: GGMLQuantizationType) -> tuple[int, int]:
    """Return the number of rows and the bytes of one; a vector is one row."""
    values, rows = math.prod(tensor.shape), tensor.shape[0] if len(tensor.shape) > 1 else 1
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if tensor.shape and tensor.shape[-1] % block:
        raise ValueError(f"rows of {tensor.shape[-1]} values are no multiple of {kind.name}'s blocks of {block}")
    return rows, values // max(1, rows) // block * block_bytes


def _pieces(file: Path, name: str, tensor: GGUFTensor, dtype: torch.dtype) -> Iterator[Tensor]:
    kind = GGMLQuantizationType(tensor.kind)
    rows, row_bytes = _rows(tensor, kind)
    at_once = max(1, _PIECE_BYTES // max(1, 4 * math.prod(tensor.shape[1:])))
    for first in range(0, rows, at_once):
        count = min(at_once, rows - first)
        data = np.fromfile(file, np.uint8, count * row_bytes, offset=tensor.start + first * row_bytes)
        data = data.reshape(count, row_bytes)
        try:
            # F64 has no entry in the library's table and needs none.
            values = data.view(np.float64) if dtype is torch.float64 else dequantize(data, kind)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{file}: tensor {name!r}: type {kind.name} cannot be dequantized; "
                "use a file in F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1 or a K quantization"
            ) from error
        yield torch.from_numpy(values.reshape(-1, *tensor.shape[1:])).to(dtype)
