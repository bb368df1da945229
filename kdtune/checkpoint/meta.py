"""Meta's original files: consolidated.NN.pth and params.json. Nothing in them is executed."""

import pickle
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdtune.checkpoint.tensors import LazyTensor
from kdtune.errors import CheckpointError, first_line

PARAMS = "params.json"

# A damaged pickle calls torch's own functions, the only ones allowed, with whatever it holds.
_DAMAGED = (RuntimeError, OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError)


def weight_files(folder: Path) -> list[Path]:
    """Return the folder's consolidated.NN.pth files in order; the list may be empty."""
    return sorted(folder.glob("consolidated.*.pth"))


def stored_tensors(
    files: Sequence[Path], parts: Sequence[dict[str, Tensor]], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, LazyTensor]:
    """Return the tensors of one model by Meta's names, unread.

    Several files are the shards of a model-parallel run: each tensor is concatenated along the one dimension in which
    its shards are shorter than in `shapes` (the full shapes, by Meta's names). Every shard holds the same norms.

    Raises:
        CheckpointError: the parts hold different names or cannot be put together.
    """
    found = {}
    for part, file in zip(parts, files, strict=True):
        if different := sorted(part.keys() ^ parts[0].keys()):
            raise CheckpointError(
                f"{file}: tensor {different[0]!r}: only in this part or only in {files[0].name}; "
                "the parts of one model hold the same names: download them again"
            )
    for name, first in parts[0].items():
        tensors = [part[name] for part in parts]
        dim = None if len(parts) == 1 else _merge_dim(files[0], name, tensors, shapes.get(name))
        shape = list(first.shape)
        if dim is not None:
            shape[dim] *= len(parts)
        whole_in = files[:1] if dim is None else files
        found[name] = LazyTensor(files[0], name, tuple(shape), first.dtype, partial(_pieces, whole_in, name, dim))
    return found


def load_part(file: Path) -> dict[str, Tensor]:
    """Return a file's tensors by Meta's names, memory-mapped; CheckpointError if it does not hold tensors alone."""
    try:
        # weights_only: the unpickler knows tensors and plain containers, so a file cannot run code.
        value: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: missing; download it again") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file}: refused, it holds more than tensors or is corrupt ({first_line(error)}); loading it could run code: "
            "use the model's safetensors, or download it again from its maker"
        ) from error
    except _DAMAGED as error:
        raise CheckpointError(
            f"{file}: not a whole .pth file: {first_line(error)}; it is cut off or corrupt: download it again"
        ) from error
    if not isinstance(value, dict) or not value or not all(isinstance(item, Tensor) for item in value.values()):
        raise CheckpointError(
            f"{file}: holds no dictionary of tensors; one of Meta's consolidated.NN.pth files expected"
        )
    return value


def _merge_dim(file: Path, name: str, parts: list[Tensor], shape: tuple[int, ...] | None) -> int | None:
    """Return the dimension along which the parts concatenate to `shape`; None if each part is the full tensor."""
    found = tuple(parts[0].shape)
    if shape is None or found == shape:
        return None
    for dim in range(len(found)):
        joined = (*found[:dim], found[dim] * len(parts), *found[dim + 1 :])
        if joined == shape and all(tuple(part.shape) == found for part in parts):
            return dim
    raise CheckpointError(
        f"{file}: tensor {name!r}: shape {list(found)} in {len(parts)} parts found, which do not join to "
        f"{list(shape)}; use the model's safetensors"
    )


def _pieces(files: Sequence[Path], name: str, dim: int | None) -> Iterator[Tensor]:
    # Mapped again for each tensor: the pages of one mapping would stay in memory, a second copy of the weights by the end.
    parts = (load_part(file)[name] for file in files)
    if dim in (None, 0):
        yield from parts
    else:
        yield torch.cat(list(parts), dim)
