"""Read the header of a GGUF file: metadata and tensor table. The tensors stay on disk.

The gguf package's reader makes an array view of every vocabulary entry: 4 s for SmolLM2's 98k strings, against 0.1 s here.
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

from kdtune.errors import CheckpointError

_MAGIC = int.from_bytes(b"GGUF", "little")
# struct's letters of the value types that are numbers.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class GGUFTensor(NamedTuple):
    """An entry of the tensor table."""

    shape: tuple[int, ...]
    """As in torch: the last dimension is contiguous."""
    kind: int
    """A `gguf.GGMLQuantizationType`."""
    start: int
    """Of its data, in bytes from the beginning of the file."""


class GGUFHeader(NamedTuple):
    """What a GGUF file says before its data."""

    metadata: dict[str, Any]
    """Key-value pairs; arrays as lists."""
    tensors: dict[str, GGUFTensor]


class _Cursor:
    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def scalars(self, form: str, count: int = 1) -> tuple[Any, ...]:
        found = struct.unpack_from(f"<{count}{form}", self.data, self.at)
        self.at += struct.calcsize(f"<{count}{form}")
        return found

    def string(self) -> str:
        (length,) = self.scalars("Q")
        if length > len(self.data) - self.at:
            raise ValueError(f"a string of {length} bytes at byte {self.at} goes beyond the end of the file")
        self.at += length
        return self.data[self.at - length : self.at].decode("utf-8", errors="replace")

    def name(self, taken: dict[str, Any]) -> str:
        found = self.string()
        if found in taken:
            raise ValueError(f"{found!r} is there twice")
        return found

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            item, count = self.scalars("I")[0], self.scalars("Q")[0]
            if count > len(self.data):
                raise ValueError(f"an array of {count} values at byte {self.at} goes beyond the end of the file")
            if item in _SCALARS:
                return list(self.scalars(_SCALARS[item], count))
            return [self.value(item) for _ in range(count)]
        if kind not in _SCALARS:
            raise ValueError(f"unknown value type {kind} at byte {self.at}")
        return self.scalars(_SCALARS[kind])[0]

    def header(self) -> GGUFHeader:
        magic, version = self.scalars("I", 2)
        if magic != _MAGIC or version not in (2, 3):
            raise ValueError(f"found magic {magic:#x}, version {version}; want a little-endian GGUF of version 2 or 3")
        num_tensors, num_pairs = self.scalars("Q", 2)
        metadata: dict[str, Any] = {}
        for _ in range(num_pairs):
            key = self.name(metadata)
            metadata[key] = self.value(self.scalars("I")[0])
        tensors: dict[str, GGUFTensor] = {}
        for _ in range(num_tensors):
            name = self.name(tensors)
            shape = self.scalars("Q", self.scalars("I")[0])[::-1]
            tensors[name] = GGUFTensor(shape, self.scalars("I")[0], self.scalars("Q")[0])
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1:
            raise ValueError(f"general.alignment={alignment!r}; must be a positive number of bytes")
        data_start = -(-self.at // alignment) * alignment
        return GGUFHeader(
            metadata, {name: tensor._replace(start=data_start + tensor.start) for name, tensor in tensors.items()}
        )


def weight_files(folder: Path) -> list[Path]:
    """Return the folder's GGUF file, empty if there is none; CheckpointError if there are several."""
    found = sorted(folder.glob("*.gguf"))
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise CheckpointError(f"{folder}: {len(found)} GGUF files ({names}); name one in checkpoint_files")
    return found


def read_gguf(file: Path) -> GGUFHeader:
    """Return metadata and tensor table of a little-endian GGUF file of version 2 or 3.

    Raises:
        CheckpointError: the file is missing, cannot be read, is no such GGUF, or ends in the header.
    """
    try:
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Cursor(data).header()
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: missing; download it again") from error
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from error
    except (ValueError, struct.error, RecursionError) as error:
        raise CheckpointError(
            f"{file}: not a whole GGUF file: {error}; it is cut off or corrupt: download it again"
        ) from error
