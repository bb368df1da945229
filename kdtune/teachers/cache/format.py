"""Write and read the files of a teacher cache: shards of examples, found by index and checked by a hash of their tokens.

Shapes: E examples of a shard, N positions of an example or of all of them, V ids of the teacher, D width of its hidden states.
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kdtune.checkpoint.atomic import atomic_file, atomic_write_text, clean_leftovers, writing
from kdtune.errors import CheckpointError, ConfigError, DataError
from kdtune.json_files import read_json, to_json
from kdtune.log import get_logger
from kdtune.paths import user_path
from kdtune.runs.folder import LOCK, lock
from kdtune.teachers.cache.header import FILE, Header, differences, read_header
from kdtune.teachers.cache.kinds import Column, columns
from kdtune.teachers.cache.shard import (
    AGAIN,
    POSITIONS,
    Row,
    Shard,
    checksum,
    described_tensor,
    shard_name,
    token_hash,
)

log = get_logger(__name__)

INDEX = "index.json"
HEAD = "head.safetensors"
# Mapped files that a reader keeps open.
_OPEN_SHARDS = 256


def lock_folder(folder: str | Path) -> Path:
    """Make a capture's folder if it is missing, lock it until this process ends, and return its path; to be called before `begin`.

    Raises:
        ConfigError: another process is writing there.
        CheckpointError: it holds something else, or cannot be made.
    """
    path = user_path(folder)
    clean_leftovers(path)  # a capture that was killed at its header has left nothing else
    _check_is_ours(path)
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    lock(path)
    return path


def _check_is_ours(path: Path) -> None:
    names = {one.name for one in path.iterdir()} if path.is_dir() else set()
    if names - {LOCK} and FILE not in names:
        raise CheckpointError(
            f"{path}: is not empty and holds no teacher cache; nothing is overwritten: choose another output_dir"
        )


def begin(folder: str | Path, header: Header) -> list[int]:
    """Make the folder of a capture, or find the one that was begun; return the numbers of the shards that it has not yet.

    On several processes, the main one calls it first.

    Raises:
        ConfigError: the folder holds a capture with another header; the message has the keys that differ.
        CheckpointError: the folder cannot be written, or holds something else.
    """
    path = user_path(folder)
    clean_leftovers(path)
    _check_is_ours(path)
    for leftover in path.glob(".tmp??????"):  # safetensors writes to a file of this name, which a killed process leaves
        leftover.unlink(missing_ok=True)
    if (path / FILE).is_file():
        found = differences(read_header(path), header)
        if found and not any((path / shard_name(number)).is_file() for number in range(header.num_shards)):
            write_header(path, header)  # nothing was captured by the one that is there
        elif found:
            listed = "\n".join(f"  {line}" for line in found)
            raise ConfigError(
                f"{path}: holds the capture of something else, and nothing is overwritten:\n{listed}\nchoose another output_dir, or "
                "delete the folder"
            )
    else:
        write_header(path, header)
    return [number for number in range(header.num_shards) if not _is_whole(path / shard_name(number), header, number)]


def write_header(path: Path, header: Header) -> None:
    """Write the header into its folder."""
    atomic_write_text(path / FILE, to_json(header.described(), indent=2) + "\n")


def _is_whole(path: Path, header: Header, number: int) -> bool:
    """Return whether a shard is there and can be read; what another program has cut off is written anew."""
    if not path.is_file():
        return False
    try:
        Shard(path, header, number).check_numbers()
    except (CheckpointError, DataError):
        log.warning("%s: is cut off or damaged, and is captured again", path)
        return False
    return True


def write_shard(folder: str | Path, header: Header, number: int, rows: Sequence[Row]) -> int:
    """Write the shard of a number, atomically, and return its size in bytes.

    rows: of all examples of the shard, in order. The file depends on header and rows alone.

    Raises:
        ValueError: the rows are not those of the shard, or not of the header's kind.
        CheckpointError: the disk is full or cannot be written.
    """
    expected, path = columns(header), user_path(folder) / shard_name(number)
    if [row.example_id for row in rows] != list(header.examples_of(number)):
        raise ValueError(f"{path}: needs one row for each of the examples {header.examples_of(number)}, in order")
    for row in rows:
        _check_row(row, expected)
    counts = torch.tensor([0, *(len(row.positions) for row in rows)])
    tensors = {
        "example_ids": torch.tensor([row.example_id for row in rows]),
        "token_hashes": torch.stack([torch.tensor(list(token_hash(row.tokens)), dtype=torch.uint8) for row in rows]),
        "lengths": torch.tensor([len(row.tokens) for row in rows], dtype=torch.int32),
        "offsets": counts.cumsum(0),
        "checksums": torch.tensor([checksum(row.positions, row.columns) for row in rows]),
        "positions": torch.cat([row.positions for row in rows]),
        **{name: torch.cat([row.columns[name] for row in rows]) for name in expected},
    }
    with atomic_file(path) as hidden:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, hidden)
    return path.stat().st_size


def write_head(folder: str | Path, weight_VD: Tensor) -> None:
    """Write the teacher's output weight beside its hidden states, atomically; what is there is replaced.

    Raises:
        CheckpointError: the disk is full or cannot be written.
    """
    with atomic_file(user_path(folder) / HEAD) as hidden:
        save_file({"weight": weight_VD.detach().cpu().contiguous()}, hidden)


def finish(folder: str | Path) -> dict[str, Any]:
    """Write the index, which says that the cache is complete, and return it; on several processes, the main one, at the end.

    Raises:
        CheckpointError: a shard is missing or damaged, or the disk cannot be written.
    """
    path = user_path(folder)
    header = read_header(path)
    shards: list[dict[str, Any]] = []
    largest: list[int] = []
    names = [shard_name(number) for number in range(header.num_shards)]
    if missing := [name for name in names if not (path / name).is_file()]:
        raise CheckpointError(
            f"{path}: {len(missing)} of {len(names)} shards are missing, such as {missing[0]}; run the same {_command(header)} again, "
            "which goes on where it stopped; on several hosts, output_dir must be a folder that all share"
        )
    for number, name in enumerate(names):
        shard = Shard(path / name, header, number)
        shards.append({"name": name, "num_rows": shard.num_rows, "bytes": shard.path.stat().st_size})
        largest += [] if shard.largest_id is None else [shard.largest_id]
    index: dict[str, Any] = {"shards": shards, "num_rows": sum(one["num_rows"] for one in shards)}
    if header.kind == "hidden":
        index["head_sha256"] = _file_sha256(path / HEAD)
    if largest:
        index["largest_id"] = max(largest)
    index["bytes"] = sum(one["bytes"] for one in shards) + (
        (path / HEAD).stat().st_size if header.kind == "hidden" else 0
    )
    atomic_write_text(path / INDEX, to_json(index, indent=2) + "\n")
    return index


class Cache:
    """A complete teacher cache, for reading. Nothing but header, index and sizes are read until a row is asked for.

    Args:
        folder: that of the capture.

    Raises:
        CheckpointError: it holds no complete cache, or a file of another size than it was written with.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = user_path(folder)
        self.header = read_header(self.folder)
        if not (self.folder / INDEX).is_file():
            raise CheckpointError(
                f"{self.folder}: is not finished: it has no {INDEX}; run the same {_command(self.header)} again, which goes on where it "
                "stopped"
            )
        self.index = read_json(self.folder / INDEX, advice=AGAIN)
        try:
            sizes = {one["name"]: one["bytes"] for one in self.index["shards"]}
        except (KeyError, TypeError):  # not an index
            sizes = {}
        if list(sizes) != [shard_name(number) for number in range(self.header.num_shards)]:
            raise CheckpointError(
                f"{self.folder / INDEX}: does not list the shards of {FILE}; copy it again, or {AGAIN}"
            )
        for name, size in sizes.items():
            file = self.folder / name
            found = file.stat().st_size if file.is_file() else None
            if found != size:
                what = "is missing" if found is None else f"has {found:,} bytes, and was written with {size:,}"
                raise CheckpointError(f"{file}: {what}; copy it again, or {AGAIN}")
        if self.header.kind == "hidden":
            self._opened_head()
        self._shard = lru_cache(_OPEN_SHARDS)(self._open)

    @property
    def columns(self) -> dict[str, Column]:
        """Columns of its kind, by name."""
        return columns(self.header)

    def fingerprint(self) -> dict[str, Any]:
        """Return the header, and a hash of the tokens and the checksums of all examples: equal for equal numbers."""
        found = hashlib.sha256()
        for number in range(self.header.num_shards):
            found.update(self._open(number).summary)
        head = {"head": self.index["head_sha256"]} if "head_sha256" in self.index else {}
        return {**self.header.described(), **head, "rows": found.hexdigest()[:16]}

    @property
    def largest_id(self) -> int | None:
        """The largest of the teacher's ids that it keeps; None: it keeps none, or its index does not say."""
        found = self.index.get("largest_id")
        return found if isinstance(found, int) else None

    @property
    def example_ids(self) -> range:
        """Indices of the examples that it has."""
        return self.header.example_ids

    @property
    def head_dtype(self) -> torch.dtype:
        """Dtype of the teacher's output weight, which is not read; of kind hidden."""
        dtype: torch.dtype = self._opened_head().get_slice("weight")[:0].dtype
        return dtype

    @property
    def head(self) -> Tensor:
        """The teacher's output weight [V, D]; of kind hidden.

        Raises:
            CheckpointError: the file is damaged.
        """
        weight: Tensor = self._opened_head().get_tensor("weight")
        if _file_sha256(file := self.folder / HEAD) != self.index.get("head_sha256"):
            raise CheckpointError(f"{file}: is not the file that was written; copy it again, or {AGAIN}")
        return weight

    def _opened_head(self) -> Any:
        file, expected = self.folder / HEAD, [self.header.vocab_size, self.header.dim]
        try:
            opened = safe_open(file, "pt")
            shape = opened.get_slice("weight").get_shape()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: is missing or cut off: {error}; copy it again, or {AGAIN}") from error
        if shape != expected:
            raise CheckpointError(f"{file}: weight is {shape}, and {FILE} says {expected}; copy both again, or {AGAIN}")
        return opened

    def read(self, example_id: int, tokens: npt.NDArray[Any]) -> Row:
        """Return what is kept of an example, checked against its tokens.

        Args:
            example_id: index of the example in the data set.
            tokens: its ids [S].

        Raises:
            DataError: the cache has no such example, or has it with other tokens, or its numbers are damaged.
            CheckpointError: the shard cannot be read.
        """
        if example_id not in self.example_ids:
            first, last = self.example_ids[0], self.example_ids[-1]
            raise DataError(
                f"{self.folder}: has no example {example_id}; it was captured of the examples {first} to {last}"
            )
        return self._shard(self.header.shard_of(example_id)).read(example_id, tokens)

    def _open(self, number: int) -> "Shard":
        return Shard(self.folder / shard_name(number), self.header, number)


def _check_row(row: Row, expected: Mapping[str, Column]) -> None:
    for name, column in {"positions": POSITIONS, **expected}.items():
        found = row.positions if name == "positions" else row.columns.get(name)
        wanted = (column.dtype, (len(row.positions), *column.shape))
        if found is None or (found.dtype, tuple(found.shape)) != wanted:
            seen = None if found is None else (found.dtype, tuple(found.shape))
            raise ValueError(
                f"example {row.example_id}: {name} must be {described_tensor(wanted)}, is {described_tensor(seen)}"
            )


def _command(header: Header) -> str:
    """Return the command that fills a cache with this header."""
    return "kdtune cache import" if "served" in header.teacher else "kdtune run cache_teacher"


def _file_sha256(path: Path) -> str | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
