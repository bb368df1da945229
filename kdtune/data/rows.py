"""Rows of a source, encoded to examples: in memory, or as a stream."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sized
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from tqdm import tqdm

from kdtune.config.check import resolve
from kdtune.data.columns import MissingColumnError, Row, Suggest
from kdtune.data.messages import type_name
from kdtune.data.parallel_rows import encoded_in_parallel, num_processes
from kdtune.data.sources import PREVIEW, Source, empty_text, open_rows, read_stream
from kdtune.data.tokenized_cache import cache_file, read_tokenized, write_tokenized
from kdtune.data.transforms import EncodedRow, Example, is_trainable, make_example
from kdtune.errors import DataError
from kdtune.log import get_logger

if TYPE_CHECKING:
    import datasets


from kdtune.data.dataset import Dataset, DatasetStats, StreamDataset, TokenizedDataset, random_state

log = get_logger(__name__)

FilterFn: TypeAlias = Callable[[Row], bool]

DEFAULT_SHUFFLE_BUFFER = 10_000


def check_not_empty(report: DatasetStats) -> None:
    """Raise a DataError that says why, if no row of a source can be trained on."""
    if report.rows == 0:
        raise DataError(empty_text(report.source))
    if report.examples == 0:
        raise DataError(f"nothing to train on: {report}; check filter_fn, masks and tokenizer.max_seq_len")


@dataclass(frozen=True)
class RowEncoder:
    """Turn the rows of a source into examples: select rows and tokenize them.

    encode: from a row to its tokens, truncated; None if it does not fit. columns: those that it reads. suggest: returns
    settings for a row that lacks one of them. is_chat, is_paired, is_prompts: those of the dataset. route_column: see Source.
    """

    encode: Callable[[Row], EncodedRow | None]
    keep: FilterFn | None = None
    columns: Collection[str] | None = None
    suggest: Suggest | None = None
    is_chat: bool = False
    is_paired: bool = False
    is_prompts: bool = False
    route_column: str | None = None

    def encoded(self, rows: Iterable[Row], report: DatasetStats) -> Iterator[EncodedRow]:
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
                report.unread.update(key for key in row if key not in (*self.columns, self.route_column))
            if found is None:
                report.too_long += 1
                continue
            report.truncated += found.truncated
            report.remarks.update(found.remarks)
            if self.is_prompts or is_trainable(found.trained):
                yield found if self.route_column is None else replace(found, route=self._route(row, report))
            else:
                report.untrainable += 1

    def _route(self, row: Row, report: DatasetStats) -> str:
        if self.route_column is None or row.get(self.route_column) is None:
            raise DataError(
                f"{report.source}: row {report.rows}: column {self.route_column!r} has no value; it is the route_column, which chooses the "
                "row's teacher; fill it, or leave the row out by filter_fn"
            )
        return str(row[self.route_column])


class RowStream(StreamDataset):
    """The rows of a `datasets.IterableDataset`, tokenized on demand. The report counts from the start of the epoch.

    encoder: turns rows into examples. source: their name in messages. shuffle_buffer: rows held for shuffling.
    """

    def __init__(
        self, rows: "datasets.IterableDataset", encoder: RowEncoder, *, source: str, shuffle_buffer: int
    ) -> None:
        self.report = DatasetStats(source)
        self.is_chat, self.is_paired, self.is_prompts = encoder.is_chat, encoder.is_paired, encoder.is_prompts
        self._rows = rows
        self._encoder = encoder
        self._shuffle_buffer = shuffle_buffer

    def examples(self, *, seed: int, epoch: int, shuffle: bool) -> Iterator[Example]:
        """Yield the examples of one epoch, in that epoch's order.

        Raises:
            DataError: a row cannot be used, or the whole epoch had no example.
        """
        report = self.report = DatasetStats(self.report.source)
        rows: Iterable[Row] = self._rows
        if shuffle:
            random = random_state(seed, epoch)
            rows = shuffled(shuffled_shards(self._rows, random), self._shuffle_buffer, random)
        for row in self._encoder.encoded(read_stream(rows, report.source), report):
            yield make_example(row.ids, row.trained, row.teacher, row.route)
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


def build_dataset(
    encode: Callable[[Row], EncodedRow | None],
    source: Source,
    filter_fn: FilterFn | str | None,
    *,
    columns: Collection[str] | None = None,
    suggest: Suggest | None = None,
    is_chat: bool = False,
    is_paired: bool = False,
    is_prompts: bool = False,
) -> Dataset:
    """Build the dataset of a source: in memory, or a stream if source.streaming. See RowEncoder for the other arguments.

    Raises:
        ConfigError: source or filter_fn cannot be used.
        DataError: the source cannot be read, a row cannot be used, or nothing can be trained on.
    """
    keep = resolve(filter_fn) if isinstance(filter_fn, str) else filter_fn
    encoder = RowEncoder(encode, keep, columns, suggest, is_chat, is_paired, is_prompts, source.route_column)
    rows = open_rows(source)
    if source.streaming and PREVIEW.get() is None:
        buffer = DEFAULT_SHUFFLE_BUFFER if source.shuffle_buffer is None else source.shuffle_buffer
        return RowStream(rows, encoder, source=source.label, shuffle_buffer=buffer)
    return tokenize_rows(rows, encoder, source.label)


def tokenize_rows(rows: Iterable[Row], encoder: RowEncoder, source: str) -> TokenizedDataset:
    """Tokenize rows into a dataset now; shows a progress bar on a terminal if it takes more than two seconds.

    Many rows are tokenized in several processes, and read from the cache if they were before (see tokenized_cache). While
    previewed (see sources.previewed), the dataset holds only the first rows and may be empty.

    Raises:
        DataError: a row cannot be used, or nothing can be trained on.
    """
    report, preview = DatasetStats(source), PREVIEW.get()
    if preview is not None:
        rows = islice(rows, preview.rows)
    total = len(rows) if isinstance(rows, Sized) else None
    file = None if preview else cache_file(rows)
    dataset = read_tokenized(file, is_chat=encoder.is_chat)
    if dataset is None:
        # A filter may have state, such as the rows that it has seen.
        processes = num_processes(rows) if encoder.keep is None else 1
        with tqdm(rows, desc=f"tokenizing {source}", total=total, unit="row", delay=2, disable=None) as progress:
            if processes == 1:
                encoded = encoder.encoded(progress, report)
            else:
                encoded = encoded_in_parallel(progress, encoder.encoded, report, processes)
            dataset = TokenizedDataset(encoded, report, is_chat=encoder.is_chat)
        write_tokenized(file, dataset)
    dataset.is_prompts = encoder.is_prompts
    report = dataset.report
    if preview is None:
        check_not_empty(report)
        _log_report(report, always=True)
    return dataset


def _kept(keep: FilterFn, row: Row) -> bool:
    try:
        answer: Any = keep(row)
    except Exception as error:  # the user's own function
        raise DataError(f"filter_fn raised {type(error).__name__}: {error}") from error
    if not isinstance(answer, bool | np.bool_):
        raise DataError(f"filter_fn must return true or false: found {type_name(answer)}")
    return bool(answer)


def _log_report(report: DatasetStats, *, always: bool = False) -> None:
    """Log the report; without `always`, only if rows were dropped or truncated, or part of their content is not read."""
    if always or report.rows > report.examples or report.truncated:
        log.info("%s", report)
    for note in report.notes():
        log.warning("%s: %s", report.source, note)
