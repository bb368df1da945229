"""Hugging Face safetensors files: find a folder's weight files and their tensors, unread."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kdtune.checkpoint.tensors import LazyTensor
from kdtune.errors import CheckpointError
from kdtune.json_files import read_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"

PICKLES = (".bin", ".pt", ".ckpt", ".pkl", ".pickle")
NO_PICKLES = (
    "pickled weights are not loaded, because a pickle can run code; download the model's .safetensors files, or write "
    "them with transformers: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
)

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def weight_files(folder: Path) -> list[Path]:
    """Return `model.safetensors`, else the index's files, or none; CheckpointError if the index is bad."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        return sorted({folder / name for name in read_index(folder).values()})
    return []


def read_index(folder: Path) -> dict[str, str]:
    """Read the index's map from tensor name to file name."""
    path = folder / INDEX
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: no 'weight_map' from tensor to file in it; download it again")
    for name, file in weight_map.items():
        if isinstance(file, str) and file.endswith(PICKLES):
            raise CheckpointError(f"{path}: tensor {name!r} lies in {file!r}: {NO_PICKLES}")
        if not isinstance(file, str) or Path(file).name != file or Path(file).suffix != ".safetensors":
            raise CheckpointError(
                f"{path}: tensor {name!r} lies in {file!r}; the name of a .safetensors file in this folder expected: "
                "download it again"
            )
    return weight_map


def stored_tensors(files: Sequence[Path], index: dict[str, str] | None = None) -> dict[str, LazyTensor]:
    """Return the tensors of safetensors files by the names in the files, unread.

    If an index is given, the files must hold exactly the tensors that it lists.

    Raises:
        CheckpointError: a file is missing, cut off or corrupt; two hold the same tensor; index and files disagree.
    """
    found: dict[str, LazyTensor] = {}
    for file in files:
        for stored in _header(file):
            if stored.name in found:
                raise CheckpointError(
                    f"{stored}: also in {found[stored.name].file.name}; each tensor lies in one file: "
                    "remove the file that does not belong to this model, or name the right ones in checkpoint_files"
                )
            found[stored.name] = stored
    if index is not None:
        _check_index(found, index, files[0].parent)
    return found


def _check_index(found: dict[str, LazyTensor], index: dict[str, str], folder: Path) -> None:
    for name, file in index.items():
        if name not in found or found[name].file.name != file:
            place = f"it lies in {found[name].file.name}" if name in found else "no file holds it"
            raise CheckpointError(
                f"{folder / file}: tensor {name!r} is not in it, though {INDEX} says so ({place}); "
                "index and files do not belong together: download them again"
            )
    if extra := next((stored for name, stored in found.items() if name not in index), None):
        raise CheckpointError(
            f"{extra}: not listed in {INDEX}; index and files do not belong together: download them again"
        )


def _header(file: Path) -> list[LazyTensor]:
    with open_safetensors(file) as handle:
        stored = []
        for name in handle.keys():  # noqa: SIM118 (not a dict)
            view = handle.get_slice(name)
            code = view.get_dtype()
            if code not in _DTYPES:
                raise CheckpointError(
                    f"{file}: tensor {name!r}: dtype {code} found; one of {', '.join(_DTYPES)} expected"
                )
            shape = tuple(view.get_shape())
            read, part = partial(_read, file, name), partial(_read_part, file, name)
            stored.append(LazyTensor(file, name, shape, _DTYPES[code], read, part))
    return stored


def _read(file: Path, name: str) -> Iterator[Tensor]:
    # Reopened for each tensor: the pages of one mapping would stay in memory until it is closed, a second copy of
    # the weights by the end. Reading the header again costs well under a millisecond.
    with open_safetensors(file) as handle:
        yield handle.get_tensor(name)


def _read_part(file: Path, name: str, region: tuple[slice, ...]) -> Tensor:
    with open_safetensors(file) as handle:
        part: Tensor = handle.get_slice(name)[region]
        return part


def open_safetensors(file: Path, device: str = "cpu") -> Any:
    """Open a file by `safetensors.safe_open` on `device`; CheckpointError if it is missing, cut off or corrupt."""
    try:
        return safe_open(file, framework="pt", device=device)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: missing; download it again") from error
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise CheckpointError(
            f"{file}: not a whole safetensors file ({file.stat().st_size} bytes): {error}; it is cut off or corrupt: "
            "download it again"
        ) from error
