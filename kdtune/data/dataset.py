"""Datasets of examples: in memory, or streamed; both know how to order an epoch."""

import hashlib
from abc import ABC, abstractmethod
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from kdtune.data.batch import Batch, collate
from kdtune.data.transforms import Encoded, EncodedRow, Example, make_example

Order: TypeAlias = npt.NDArray[np.int64]

# For datasets that are not in memory, a fingerprint covers this many examples.
_FINGERPRINT_EXAMPLES = 64


@dataclass
class DatasetStats:
    """Counts of a source's rows: how many are used, and why the others are not."""

    source: str
    rows: int = 0
    filtered: int = 0
    truncated: int = 0
    untrainable: int = 0
    """Rows dropped because no label was left to train on (after truncation)."""
    too_long: int = 0
    """Rows dropped because they do not fit into max_seq_len."""
    remarks: Counter[str] = field(default_factory=Counter)
    """Further notes on the rows, such as content that the chat template omits, with the number of rows."""
    unread: Counter[str] = field(default_factory=Counter)
    """Columns that the dataset does not read, with the number of rows that have them."""

    @property
    def examples(self) -> int:
        """Number of rows that can be trained on."""
        return self.rows - self.filtered - self.untrainable - self.too_long

    def __str__(self) -> str:
        parts = [f"{self.source}: {self.examples} examples from {self.rows} rows"]
        for count, what in (
            (self.filtered, "filtered out"),
            (self.truncated, "truncated to max_seq_len"),
            (self.too_long, "left out: longer than max_seq_len"),
            (self.untrainable, "left out: no label to train on within max_seq_len"),
        ):
            if count:
                parts.append(f"{count} {what}")
        return ", ".join(parts)

    def notes(self) -> list[str]:
        """List row contents that do not reach the model, one sentence each."""
        found = [f"{remark} ({count} of {self.rows} rows)" for remark, count in self.remarks.most_common()]
        if self.unread:
            found.append(f"columns that are not read: {', '.join(map(str, self.unread))}")
        return found


# Its name in datasets written for earlier versions.
Report = DatasetStats


def total_report(reports: Iterable[DatasetStats], source: str) -> DatasetStats:
    """Sum several reports under one name."""
    total = DatasetStats(source)
    for report in reports:
        for name in ("rows", "filtered", "truncated", "untrainable", "too_long", "remarks", "unread"):
            setattr(total, name, getattr(total, name) + getattr(report, name))
    return total


def random_state(*key: int) -> np.random.Generator:
    """Return a generator that depends only on the key (integers >= 0)."""
    return np.random.default_rng(key)


class Dataset(ABC):
    """Examples to iterate epoch by epoch, in an order that depends only on (seed, epoch)."""

    report: DatasetStats
    is_chat: bool = False
    """True if examples are conversations in the tokenizer's chat template. What a recipe saves then carries the template and
    stops after an answer. A class of your own whose examples are conversations sets it to True."""
    is_paired: bool = False
    """True if every example has the same text in a teacher's own tokens too, see `Example.teacher`."""

    is_prompts: bool = False
    """True if examples are prompts alone, of which nothing is trained on, and a model writes their answers."""

    @abstractmethod
    def examples(self, *, seed: int, epoch: int, shuffle: bool) -> Iterator[Example]:
        """Yield the examples of one epoch, in that epoch's order."""

    def collate(self, examples: Sequence[Example], pad_id: int) -> Batch:
        """Make the batch of these examples, see `kdtune.data.collate`.

        A dataset whose batches have other inputs or another layout overrides it; its examples may be of a subclass of
        `Example`. Without examples, the batch has no label.
        """
        return collate(examples, pad_id, is_paired=self.is_paired)

    @property
    def has_own_batches(self) -> bool:
        """True if batches are made by a `collate` of the dataset's class, and not by that of this one."""
        return type(self).collate is not Dataset.collate

    @property
    def lengths(self) -> Sequence[int] | None:
        """Number of tokens of each example; None if unknown before the examples are read."""
        return None

    @property
    def teacher_lengths(self) -> Sequence[int] | None:
        """Number of a teacher's own tokens of each example; None if unknown, or if the teacher reads the same ones."""
        return None

    def fingerprint(self) -> str:
        """Return a text that is equal for equal examples in the same order: their number, and a hash of them.

        This implementation reads and hashes the first ones, in the source's order.
        """
        first = list(islice(self.examples(seed=0, epoch=0, shuffle=False), _FINGERPRINT_EXAMPLES))
        return f"the first {len(first)} examples, {_hash_of(first)}"


class MapDataset(Dataset):
    """Examples that can be fetched by index; an epoch is a sequence of `len(dataset)` indices."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of examples in an epoch."""

    @abstractmethod
    def __getitem__(self, index: int) -> Example:
        """Return the example at an index below `size`."""

    @property
    def size(self) -> int:
        """Number of examples; it differs from the length of an epoch only if an epoch repeats or omits examples."""
        return len(self)

    def fingerprint(self) -> str:
        """Return a text that is equal for equal examples in the same order; hashes examples spread evenly over the dataset."""
        chosen = np.unique(np.linspace(0, self.size - 1, min(self.size, _FINGERPRINT_EXAMPLES)).astype(np.int64))
        return f"{self.size} examples, {_hash_of(self[int(index)] for index in chosen)}"

    def order(self, *, seed: int, epoch: int, shuffle: bool) -> Order:
        """Return the indices of an epoch [len], in order: a permutation if shuffled."""
        return random_state(seed, epoch).permutation(len(self)) if shuffle else np.arange(len(self))

    def examples(self, *, seed: int, epoch: int, shuffle: bool) -> Iterator[Example]:
        """Yield the examples of one epoch, in that epoch's order."""
        return (self.numbered(int(index)) for index in self.order(seed=seed, epoch=epoch, shuffle=shuffle))

    def numbered(self, index: int) -> Example:
        """Return the example at an index below `size`, with the index in it."""
        return replace(self[index], index=index)


class TokenizedDataset(MapDataset):
    """Examples held in memory as token ids (int32) and training flags, 5 bytes a token.

    encoded: ids and flags of each example, as returned by `Tokenizer.tokenize_messages`, or rows. report: counts of the rows
    they come from. is_chat: see `Dataset`.
    """

    def __init__(self, encoded: Iterable[Encoded | EncodedRow], report: DatasetStats, *, is_chat: bool = False) -> None:
        ids, trained, ends = array("i"), bytearray(), array("q", [0])
        self._teachers: list[Any] = []
        self.routes: list[str] = []
        for one in encoded:
            row = one if isinstance(one, EncodedRow) else EncodedRow(*one)
            ids.extend(row.ids)
            trained.extend(row.trained)
            ends.append(len(ids))
            if row.teacher is not None:
                self._teachers.append(row.teacher.packed())
            if row.route is not None:
                self.routes.append(row.route)
        self.report = report
        self.is_chat = is_chat
        self.is_paired = bool(self._teachers)
        self._ids = np.frombuffer(ids, dtype=np.int32)
        self._trained = np.frombuffer(trained, dtype=np.bool_)
        self._ends = np.frombuffer(ends, dtype=np.int64)

    @classmethod
    def of_arrays(
        cls,
        ids: npt.NDArray[np.int32],
        trained: npt.NDArray[np.bool_],
        ends: npt.NDArray[np.int64],
        report: DatasetStats,
        *,
        is_chat: bool,
        routes: list[str] | None = None,
    ) -> "TokenizedDataset":
        """Return the dataset with these `arrays`, and `routes`; ValueError if they do not fit each other."""
        dataset = cls([], report, is_chat=is_chat)
        dataset.routes = routes or []
        kinds = [(one.dtype.type, one.ndim) for one in (ids, trained, ends)]
        fits = kinds == [(np.int32, 1), (np.bool_, 1), (np.int64, 1)] and len(ends) > 0
        fits = fits and len(dataset.routes) in (0, len(ends) - 1)
        if not fits or ends[0] != 0 or (np.diff(ends) < 0).any() or not len(ids) == len(trained) == ends[-1]:
            raise ValueError("its arrays do not fit each other")
        dataset._ids, dataset._trained, dataset._ends = ids, trained, ends
        return dataset

    def arrays(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
        """Return the token ids and training flags of all examples, end to end, and where each example ends, from 0."""
        return self._ids, self._trained, self._ends

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        part = slice(self._ends[index], self._ends[index + 1])
        teacher = self._teachers[index].unpacked() if self._teachers else None
        return make_example(self._ids[part], self._trained[part], teacher, self.routes[index] if self.routes else None)

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each example."""
        found: list[int] = np.diff(self._ends).tolist()
        return found

    @property
    def teacher_lengths(self) -> list[int] | None:
        """Number of teacher tokens of each example."""
        return [len(teacher.tokens) for teacher in self._teachers] if self.is_paired else None

    def fingerprint(self) -> str:
        """Return the number of examples and a hash of all their tokens and training flags, and one of their routes, if any."""
        of_teacher = [array for teacher in self._teachers for array in (teacher.tokens, teacher.chunks_K5)]
        found = f"{len(self)} examples, {_hash_of_arrays([self._ends, self._ids, self._trained, *of_teacher])}"
        return found + (f", routes {_hash_of_arrays([np.array(self.routes)])}" if self.routes else "")


class StreamDataset(Dataset):
    """Examples read and tokenized on demand; shuffled within a buffer of rows."""


def _hash_of(examples: Iterable[Example]) -> str:
    return _hash_of_arrays(array for example in examples for array in (example.tokens, example.labels))


def _hash_of_arrays(arrays: Iterable[npt.NDArray[Any]]) -> str:
    found = hashlib.sha256()
    for one in arrays:
        found.update(f"{one.dtype} {one.size} ".encode())
        found.update(np.ascontiguousarray(one).data)
    return found.hexdigest()[:16]


def report_copy(report: DatasetStats) -> DatasetStats:
    """Return a copy of the report in its current state."""
    return replace(report, remarks=report.remarks.copy(), unread=report.unread.copy())
