"""Datasets of examples: tokenized in memory, or streamed; both know how to order an epoch."""

import hashlib
from abc import ABC, abstractmethod
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from kdtune.config.resolve import resolve
from kdtune.data.columns import MissingColumnError, Row, Suggest
from kdtune.data.messages import type_name
from kdtune.data.sources import PREVIEW, Source, empty_text, open_rows, read_stream
from kdtune.data.transforms import Encoded, EncodedRow, Example, is_trainable, make_example
from kdtune.errors import DataError
from kdtune.log import get_logger

if TYPE_CHECKING:
    import datasets


log = get_logger(__name__)

FilterFn: TypeAlias = Callable[[Row], bool]
Order: TypeAlias = npt.NDArray[np.int64]

DEFAULT_SHUFFLE_BUFFER = 10_000
# For datasets that are not in memory, a fingerprint covers this many examples.
_FINGERPRINT_EXAMPLES = 64


@dataclass
class Report:
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


def total_report(reports: Iterable[Report], source: str) -> Report:
    """Sum several reports under one name."""
    total = Report(source)
    for report in reports:
        for name in ("rows", "filtered", "truncated", "untrainable", "too_long", "remarks", "unread"):
            setattr(total, name, getattr(total, name) + getattr(report, name))
    return total


def check_not_empty(report: Report) -> None:
    """Raise a DataError that says why, if no row of a source can be trained on."""
    if report.rows == 0:
        raise DataError(empty_text(report.source))
    if report.examples == 0:
        raise DataError(f"nothing to train on: {report}; check filter_fn, masks and tokenizer.max_seq_len")


def random_state(*key: int) -> np.random.Generator:
    """Return a generator that depends only on the key (integers >= 0)."""
    return np.random.default_rng(key)


class Dataset(ABC):
    """Examples to iterate epoch by epoch, in an order that depends only on (seed, epoch)."""

    report: Report
    is_chat: bool = False
    """True if examples are conversations in the tokenizer's chat template. What a recipe saves then carries the template and
    stops after an answer. A class of your own whose examples are conversations sets it to True."""

    @abstractmethod
    def examples(self, *, seed: int, epoch: int, shuffle: bool) -> Iterator[Example]:
        """Yield the examples of one epoch, in that epoch's order."""

    @property
    def lengths(self) -> Sequence[int] | None:
        """Number of tokens of each example; None if unknown before the examples are read."""
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

    encoded: ids and flags of each example, as returned by `Tokenizer.tokenize_messages`. report: counts of the rows they
    come from. is_chat: see `Dataset`.
    """

    def __init__(self, encoded: Iterable[Encoded], report: Report, *, is_chat: bool = False) -> None:
        ids, trained, ends = array("i"), bytearray(), array("q", [0])
        for example_ids, example_trained in encoded:
            ids.extend(example_ids)
            trained.extend(example_trained)
            ends.append(len(ids))
        self.report = report
        self.is_chat = is_chat
        self._ids = np.frombuffer(ids, dtype=np.int32)
        self._trained = np.frombuffer(trained, dtype=np.bool_)
        self._ends = np.frombuffer(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        part = slice(self._ends[index], self._ends[index + 1])
        return make_example(self._ids[part], self._trained[part])

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each example."""
        found: list[int] = np.diff(self._ends).tolist()
        return found

    def fingerprint(self) -> str:
        """Return the number of examples and a hash of all their tokens and training flags."""
        return f"{len(self)} examples, {_hash_of_arrays([self._ends, self._ids, self._trained])}"


@dataclass(frozen=True)
class RowEncoder:
    """Turn the rows of a source into examples: select rows and tokenize them.

    encode: from a row to its tokens, truncated; None if it does not fit. columns: those that it reads. suggest: returns
    settings for a row that lacks one of them. is_chat: that of the dataset.
    """

    encode: Callable[[Row], EncodedRow | None]
    keep: FilterFn | None = None
    columns: Collection[str] | None = None
    suggest: Suggest | None = None
    is_chat: bool = False

    def encoded(self, rows: Iterable[Row], report: Report) -> Iterator[Encoded]:
        """Yield the rows that can be trained on, tokenized and truncated; the report counts every row read."""
        for row in rows:
            report.rows += 1
            try:
                if self.keep is not None and not _kept(self.keep, row):
                    report.filtered += 1
                    continue
                found = self.encode(row)
            except MissingColumnError as error:
                settings = error.settings if self.suggest is None else self.suggest(row)
                raise MissingColumnError(f"{report.source}: row {report.rows}: {error.problem}", settings) from error
            except DataError as error:
                raise DataError(f"{report.source}: row {report.rows}: {error}") from error
            except RecursionError as error:
                raise DataError(f"{report.source}: row {report.rows}: nested too deeply; take the row out") from error
            if self.columns is not None:
                report.unread.update(key for key in row if key not in self.columns)
            if found is None:
                report.too_long += 1
                continue
            report.truncated += found.truncated
            report.remarks.update(found.remarks)
            if is_trainable(found.trained):
                yield list(found.ids), list(found.trained)
            else:
                report.untrainable += 1


class StreamDataset(Dataset):
    """Examples read and tokenized on demand; shuffled within a buffer of rows."""


class RowStream(StreamDataset):
    """The rows of a `datasets.IterableDataset`, tokenized on demand. The report counts from the start of the epoch.

    encoder: turns rows into examples. source: their name in messages. shuffle_buffer: rows held for shuffling.
    """

    def __init__(
        self, rows: "datasets.IterableDataset", encoder: RowEncoder, *, source: str, shuffle_buffer: int
    ) -> None:
        self.report = Report(source)
        self.is_chat = encoder.is_chat
        self._rows = rows
        self._encoder = encoder
        self._shuffle_buffer = shuffle_buffer

    def examples(self, *, seed: int, epoch: int, shuffle: bool) -> Iterator[Example]:
        """Yield the examples of one epoch, in that epoch's order.

        Raises:
            DataError: a row cannot be used, or the whole epoch had no example.
        """
        report = self.report = Report(self.report.source)
        rows: Iterable[Row] = self._rows
        if shuffle:
            random = random_state(seed, epoch)
            rows = shuffled(shuffled_shards(self._rows, random), self._shuffle_buffer, random)
        for ids, trained in self._encoder.encoded(read_stream(rows, report.source), report):
            yield make_example(ids, trained)
        check_not_empty(report)
        _log_report(report)


def shuffled_shards(rows: "datasets.IterableDataset", random: np.random.Generator) -> Iterator[Row]:
    """Return the rows of a stream with its shards (files) in random order."""
    # IterableDataset.shuffle is not used: in a DataLoader worker it draws another order than in the main process.
    for shard in random.permutation(rows.num_shards):
        yield from rows.shard(rows.num_shards, int(shard))


def shuffled(rows: Iterable[Row], buffer_size: int, random: np.random.Generator) -> Iterator[Row]:
    """Yield the rows, each drawn at random from a buffer of the next buffer_size rows."""
    buffer: list[Row] = []
    for row in rows:
        if len(buffer) < buffer_size:
            buffer.append(row)
        else:
            drawn = int(random.integers(buffer_size))
            yield buffer[drawn]
            buffer[drawn] = row
    for index in random.permutation(len(buffer)):
        yield buffer[index]


def _hash_of(examples: Iterable[Example]) -> str:
    return _hash_of_arrays(array for example in examples for array in (example.tokens, example.labels))


def _hash_of_arrays(arrays: Iterable[npt.NDArray[Any]]) -> str:
    found = hashlib.sha256()
    for one in arrays:
        found.update(f"{one.dtype} {one.size} ".encode())
        found.update(np.ascontiguousarray(one).data)
    return found.hexdigest()[:16]


def build_dataset(
    encode: Callable[[Row], EncodedRow | None],
    source: Source,
    filter_fn: FilterFn | str | None,
    *,
    columns: Collection[str] | None = None,
    suggest: Suggest | None = None,
    is_chat: bool = False,
) -> Dataset:
    """Build the dataset of a source: in memory, or a stream if source.streaming. See RowEncoder for the other arguments.

    Raises:
        ConfigError: source or filter_fn cannot be used.
        DataError: the source cannot be read, a row cannot be used, or nothing can be trained on.
    """
    encoder = RowEncoder(encode, resolve_filter(filter_fn), columns, suggest, is_chat)
    rows = open_rows(source)
    if source.streaming and PREVIEW.get() is None:
        buffer = DEFAULT_SHUFFLE_BUFFER if source.shuffle_buffer is None else source.shuffle_buffer
        return RowStream(rows, encoder, source=source.label, shuffle_buffer=buffer)
    return tokenize_rows(rows, encoder, source.label)


def tokenize_rows(rows: Iterable[Row], encoder: RowEncoder, source: str) -> TokenizedDataset:
    """Tokenize rows into a dataset now; shows a progress bar on a terminal if it takes more than two seconds.

    While previewed (see sources.previewed), the dataset holds only the first rows and may be empty.

    Raises:
        DataError: a row cannot be used, or nothing can be trained on.
    """
    report, preview = Report(source), PREVIEW.get()
    if preview is not None:
        rows = islice(rows, preview.rows)
    total = len(rows) if isinstance(rows, Sized) else None
    with tqdm(rows, desc=f"tokenizing {source}", total=total, unit="row", delay=2, disable=None) as progress:
        dataset = TokenizedDataset(encoder.encoded(progress, report), report, is_chat=encoder.is_chat)
    if preview is None:
        check_not_empty(report)
        _log_report(report, always=True)
    return dataset


def resolve_filter(filter_fn: FilterFn | str | None) -> FilterFn | None:
    """Return the filter function; text is resolved as a dotted path."""
    return resolve(filter_fn) if isinstance(filter_fn, str) else filter_fn


def _kept(keep: FilterFn, row: Row) -> bool:
    try:
        answer: Any = keep(row)
    except Exception as error:  # the user's own function
        raise DataError(f"filter_fn raised {type(error).__name__}: {error}") from error
    if not isinstance(answer, bool | np.bool_):
        raise DataError(f"filter_fn must return true or false: found {type_name(answer)}")
    return bool(answer)


def _log_report(report: Report, *, always: bool = False) -> None:
    """Log the report; without `always`, only if rows were dropped or truncated, or part of their content is not read."""
    if always or report.rows > report.examples or report.truncated:
        log.info("%s", report)
    for note in report.notes():
        log.warning("%s: %s", report.source, note)


def report_copy(report: Report) -> Report:
    """Return a copy of the report in its current state."""
    return replace(report, remarks=report.remarks.copy(), unread=report.unread.copy())
