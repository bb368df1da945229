"""One file of a teacher cache: the examples of a shard, found by place and checked by a hash of their tokens.

Shapes: E examples of a shard, N positions of an example or of all of them, S tokens of an example.
"""

import hashlib
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kdtune.errors import CheckpointError, DataError
from kdtune.teachers.cache.header import Header
from kdtune.teachers.cache.kinds import Column, columns

HASH_BYTES = 16
AGAIN = "make it again: delete the folder, and run the same kdtune run cache_teacher, or kdtune cache import"

# Tensors of a shard that tell of its examples, and their dtypes.
_EXAMPLE_TENSORS = {
    "example_ids": torch.int64,
    "token_hashes": torch.uint8,
    "lengths": torch.int32,
    "offsets": torch.int64,
    "checksums": torch.int64,
}
POSITIONS = Column(torch.int32)


@dataclass(frozen=True)
class Row:
    """What a cache keeps of one example."""

    example_id: int
    """Index of the example in its data set."""
    tokens: npt.NDArray[Any]
    """All of the example's ids [S], as the teacher read them."""
    positions: Tensor
    """int32 [N], ascending: the positions in the example that are kept; position t predicts token t + 1."""
    columns: Mapping[str, Tensor]
    """The kind's, see `kdtune.teachers.cache.columns`: [N, ...] each."""


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{number:05d}.safetensors"


def shard_tensors(header: Header, num_examples: int, num_rows: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return dtype and shape of each tensor of a shard with so many examples, and positions of all of them."""
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(_EXAMPLE_TENSORS, (num_examples,))
    shapes |= {"token_hashes": (num_examples, HASH_BYTES), "offsets": (num_examples + 1,)}
    of_rows = {"positions": POSITIONS, **columns(header)}
    return {name: (dtype, shapes[name]) for name, dtype in _EXAMPLE_TENSORS.items()} | {
        name: (column.dtype, (num_rows, *column.shape)) for name, column in of_rows.items()
    }


class Shard:
    """One file of a cache, mapped: its table of examples is read, its columns when a row is asked for.

    Args:
        path: the file.
        header: the cache's.
        number: of the shard.

    Raises:
        CheckpointError: it cannot be read, or its tensors are not those of the header's kind.
    """

    def __init__(self, path: Path, header: Header, number: int) -> None:
        self.path, self.header, self._columns = path, header, columns(header)
        try:
            self._file = safe_open(path, "pt")
            table = {name: self._file.get_tensor(name) for name in _EXAMPLE_TENSORS}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}; copy it again, or {AGAIN}") from error
        self._first, self._table = header.examples_of(number).start, {name: one.numpy() for name, one in table.items()}
        self._check(table, len(header.examples_of(number)))

    @property
    def num_rows(self) -> int:
        """Number of positions of all its examples."""
        return int(self._table["offsets"][-1])

    @property
    def largest_id(self) -> int | None:
        """The largest of the teacher's ids that it has; all are read. None: it has none."""
        return int(self._file.get_tensor("ids").max()) if "ids" in self._columns and self.num_rows else None

    @property
    def summary(self) -> bytes:
        """Hashes of the examples' tokens, and checksums of their numbers."""
        return b"".join(self._table[name].tobytes() for name in ("token_hashes", "checksums"))

    def check_numbers(self) -> None:
        """Read all columns, and raise DataError if the numbers of an example are not those that were written."""
        for at in range(len(self._table["lengths"])):
            self._columns_of(at)

    def read(self, example_id: int, tokens: npt.NDArray[Any]) -> Row:
        """Return what is kept of an example; arguments and errors as of `Cache.read`."""
        at = example_id - self._first
        if self._table["token_hashes"][at].tobytes() != token_hash(tokens):
            raise DataError(f"{self.path}: example {example_id} {self._difference(at, len(tokens))}")
        return Row(example_id, tokens, *self._columns_of(at))

    def _columns_of(self, at: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the positions and the columns of the example at a place of the table, checked."""
        start, end = (int(x) for x in self._table["offsets"][at : at + 2])
        read = {name: self._file.get_slice(name)[start:end] for name in ("positions", *self._columns)}
        positions = read.pop("positions")
        if checksum(positions, read) != self._table["checksums"][at]:
            raise DataError(
                f"{self.path}: the numbers of example {self._first + at} are not those that were written: the file is damaged; copy it "
                f"again, or {AGAIN}"
            )
        return positions, read

    def _difference(self, at: int, length: int) -> str:
        """Say how the tokens of a run differ from those that were captured."""
        stored = int(self._table["lengths"][at])
        if stored == length:
            return (
                "has other tokens in the run than it had when the cache was captured: another tokenizer, chat template, date, or text; "
                "use the settings of the capture (header.json), or capture again"
            )
        limit = self.header.max_seq_len
        if stored == limit:
            return (
                f"has {length} tokens in the run, and was cut at tokenizer.max_seq_len={limit} when the cache was captured: the run cuts "
                "it elsewhere, as a kd_loss of two tokenizers does (ALM); capture and train with a max_seq_len that cuts no example"
            )
        return (
            f"has {length} tokens in the run, and had {stored} when the cache was captured, with "
            f"tokenizer.max_seq_len={'null' if limit is None else limit}: it is cut at another length, or is another text; use the "
            "settings of the capture (header.json), or capture again"
        )

    def _check(self, table: Mapping[str, Tensor], num_examples: int) -> None:
        found = {name: (one.dtype, tuple(one.shape)) for name, one in table.items()}
        expected, names = shard_tensors(self.header, num_examples, self.num_rows), set(self._file.keys())
        for name in expected:
            if name not in found and name in names:
                part = self._file.get_slice(name)
                found[name] = (part[:0].dtype, tuple(part.get_shape()))
        for name, one in expected.items():
            if found.get(name) != one:
                raise CheckpointError(
                    f"{self.path}: tensor {name} must be {described_tensor(one)}, is {described_tensor(found.get(name))}; {AGAIN}"
                )
        ids = range(self._first, self._first + num_examples)
        if not np.array_equal(self._table["example_ids"], np.arange(ids.start, ids.stop)):
            raise CheckpointError(
                f"{self.path}: must hold the examples {ids.start} to {ids.stop - 1}, in order; {AGAIN}"
            )
        offsets = self._table["offsets"]
        if offsets[0] != 0 or (offsets[1:] < offsets[:-1]).any():
            raise CheckpointError(f"{self.path}: tensor offsets must rise from 0; {AGAIN}")


def token_hash(tokens: npt.ArrayLike) -> bytes:
    """Return the first 16 bytes of the SHA-256 of token ids [S], as little-endian int32."""
    return hashlib.sha256(np.asarray(tokens).astype("<i4").tobytes()).digest()[:HASH_BYTES]


def checksum(positions: Tensor, values: Mapping[str, Tensor]) -> int:
    """Return the CRC-32 of the bytes of an example's positions, then of its columns, sorted by name."""
    found = 0
    for one in (positions, *(values[name] for name in sorted(values))):
        found = zlib.crc32(one.contiguous().view(torch.uint8).numpy().data, found)
    return found


def described_tensor(one: tuple[torch.dtype, tuple[int, ...]] | None) -> str:
    """Return dtype and shape as a message has them; "missing" for None."""
    return "missing" if one is None else f"{str(one[0]).removeprefix('torch.')} {list(one[1])}"
