"""Safetensors files that all processes write together, each its own shards in place: no tensor is all-gathered.

The layout is that of https://huggingface.co/docs/safetensors: 8 bytes with the header's length, the header (JSON), the
data. torch's own HuggingFaceStorageWriter is not used: as of 2.13 it writes every byte twice (first one file per process,
which rank 0 alone copies into the final ones and leaves behind), and its header lacks the `format` that transformers
asks for.
"""

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from kdtune.checkpoint.atomic import sync, writing
from kdtune.distributed import (
    full_tensor,
    is_first_replica,
    is_rank_zero,
    local_slices,
    raise_on_all_ranks,
    to_cpu_copy,
    to_local,
)

Write = Callable[[Path, ProcessGroup | None], None]
"""Writes something into a folder that exists; all processes call it, and talk to each other in the group (None: the run's)."""

# safetensors' names, in the order in which it puts the tensors of a file.
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def tensor_writer(
    files: Mapping[str, Mapping[str, Sequence[Callable[[], Tensor]]]],
    like: Mapping[str, Tensor],
    *,
    staged: bool = False,
) -> Write:
    """Return a function that writes the tensors as safetensors files, bit-identical to `save_file(..., metadata={"format": "pt"})`.

    Args:
        files: for each file, by a tensor's name, functions that compute the blocks of rows that it consists of, such as one
            for all; all processes call them, in this order.
        like: for each name, a tensor of the same shape and dtype, such as one on the meta device.
        staged: compute the tensors now and keep copies of this process's shards in CPU memory until they are written;
            otherwise each is computed when it is written.

    Writing raises CheckpointError on all processes when it fails on one.
    """
    layouts = {file: _layout({name: like[name] for name in tensors}) for file, tensors in files.items()}
    shards: Iterable[_Shard] = _shards(files, layouts)
    if staged:
        shards = [replace(shard, values=to_cpu_copy(shard.values)) for shard in shards]

    def write(folder: Path, group: ProcessGroup | None = None) -> None:
        with raise_on_all_ranks(group), writing(folder):
            if is_rank_zero():
                for file, layout in layouts.items():
                    _create(folder / file, layout)
        with raise_on_all_ranks(group), writing(folder):
            _write_shards(folder, shards)

    return write


@dataclass(frozen=True)
class _Layout:
    header: bytes
    begins: dict[str, int]
    """The byte of the file where each tensor begins."""
    num_bytes: int
    """Bytes of the whole file."""


@dataclass(frozen=True)
class _Shard:
    """One process's shard of a tensor or of a block of its rows, to be written."""

    file: str
    begin: int
    """The byte of the file where the whole block begins."""
    shape: torch.Size
    """Shape of the full block."""
    region: tuple[slice, ...]
    """Slices of the full block that the values cover."""
    values: Tensor


def _layout(tensors: Mapping[str, Tensor]) -> _Layout:
    order = list(_DTYPES)
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins, end = {}, 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (order.index(item[1].dtype), item[0])):
        begins[name], end = end, end + tensor.numel() * tensor.dtype.itemsize
        offsets = [begins[name], end]
        entries[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    begins = {name: len(header) + begin for name, begin in begins.items()}
    return _Layout(header, begins, len(header) + end)


def _shards(
    files: Mapping[str, Mapping[str, Sequence[Callable[[], Tensor]]]], layouts: Mapping[str, _Layout]
) -> Iterator[_Shard]:
    """Yield the shards that this process writes, one at a time."""
    for file, tensors in files.items():
        for name, blocks in tensors.items():
            begin = layouts[file].begins[name]
            for compute in blocks:
                tensor = compute()
                if any(placement.is_partial() for placement in getattr(tensor, "placements", ())):
                    tensor = full_tensor(tensor)
                values, region = to_local(tensor), local_slices(tensor)
                if is_first_replica(tensor) and values.numel():
                    yield _Shard(file, begin, tensor.shape, region, values)
                begin += tensor.numel() * tensor.dtype.itemsize


def _create(path: Path, layout: _Layout) -> None:
    """Create a file with the header and room for the data."""
    with path.open("wb") as file:
        file.write(layout.header)
        file.truncate(layout.num_bytes)


def _write_shards(folder: Path, shards: Iterable[_Shard]) -> None:
    failure: OSError | None = None
    written = set()
    for shard in shards:
        # The other processes need this one to compute their tensors, so it continues to the end even after an error.
        if failure is None:
            try:
                _write_shard(folder / shard.file, shard)
                written.add(folder / shard.file)
            except OSError as error:
                failure = error
    if failure is not None:
        raise failure
    for path in written:
        # Each host has to flush its own part; rank 0 could only flush that of its host.
        sync(path)


def _write_shard(path: Path, shard: _Shard) -> None:
    values = shard.values.detach().cpu().contiguous()
    stretches = values.flatten().view(torch.uint8).numpy()
    length = _stretch(shard.shape, shard.region) * values.dtype.itemsize
    # Write-only: a network file system then sends the bytes that were written, never whole pages with a neighbour's in them.
    with os.fdopen(os.open(path, os.O_WRONLY), "wb") as file:
        for index, first in enumerate(_firsts(shard.shape, shard.region)):
            file.seek(shard.begin + first * values.dtype.itemsize)
            file.write(stretches[index * length : (index + 1) * length].data)


def _num_outer(shape: torch.Size, region: tuple[slice, ...]) -> int:
    """Return how many dimensions precede the last one that the region covers only partly."""
    cut = [dim for dim, part in enumerate(region) if part.stop - part.start < shape[dim]]
    return cut[-1] if cut else 0


def _stretch(shape: torch.Size, region: tuple[slice, ...]) -> int:
    """Return how many consecutive elements of the region are also consecutive in the full tensor."""
    return math.prod(part.stop - part.start for part in region[_num_outer(shape, region) :])


def _firsts(shape: torch.Size, region: tuple[slice, ...]) -> Iterator[int]:
    """Return the index in the full tensor of the first element of each such stretch, in the region's order."""
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    outer = _num_outer(shape, region)
    inner = sum(part.start * stride for part, stride in zip(region[outer:], strides[outer:], strict=True))
    for indices in product(*(range(part.start, part.stop) for part in region[:outer])):
        yield inner + sum(index * stride for index, stride in zip(indices, strides, strict=False))
