"""Read rows from the hub, or from local json, jsonl, csv, parquet and text files."""

import csv
import gzip
import json
import re
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from glob import escape
from itertools import islice
from typing import IO, TYPE_CHECKING, Any, TypedDict

from kdtune.data.columns import Row
from kdtune.data.files import (
    LOCAL_KINDS,
    DataFiles,
    ElsewhereError,
    FilesOfSplits,
    is_url,
    kind_of,
    listed_files,
    local_folder,
)
from kdtune.data.messages import type_name
from kdtune.errors import ConfigError, DataError
from kdtune.paths import user_path

if TYPE_CHECKING:
    import datasets

_PLAIN_SPLIT = re.compile(r"[A-Za-z_][\w.-]*")


class SourceOptions(TypedDict, total=False):
    """Arguments of a dataset builder beside `source`; see Source."""

    split: str
    data_files: DataFiles | None
    data_dir: str | None
    name: str | None
    streaming: bool
    shuffle_buffer: int | None
    route_column: str | None


@dataclass(frozen=True)
class Source:
    """Location of a dataset's rows.

    source: a hub dataset ("tatsu-lab/alpaca"), a local folder of data files, a local file, or one of json, csv, parquet
    and text together with data_files. split may be an expression such as "train[:90%]" (not when streaming).
    shuffle_buffer: rows held for shuffling a stream. route_column: the one whose values choose the teacher of a row, see
    kdtune.teachers.Routed.
    """

    source: str
    split: str = "train"
    data_files: DataFiles | None = None
    data_dir: str | None = None
    name: str | None = None
    streaming: bool = False
    shuffle_buffer: int | None = None
    route_column: str | None = None

    @property
    def label(self) -> str:
        """Name of the source in messages: the source with its files, and the split."""
        files = self.data_files.get(self.split, []) if isinstance(self.data_files, dict) else self.data_files
        if self.source in LOCAL_KINDS and files:
            paths = [files] if isinstance(files, str) else files
            more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
            return f"{paths[0]}{more} ({self.split})"
        return f"{self.data_dir if self.source in LOCAL_KINDS and self.data_dir else self.source} ({self.split})"


def open_rows(source: Source) -> Any:
    """Open the rows of a source: an iterable of mappings, or a `datasets.IterableDataset` if source.streaming.

    Raises:
        ConfigError: settings contradict each other.
        DataError: a missing file, an unknown split, or a file that cannot be read.
    """
    if source.shuffle_buffer is not None and (not source.streaming or source.shuffle_buffer < 1):
        raise ConfigError(
            f"shuffle_buffer={source.shuffle_buffer}: rows to hold while shuffling a stream, at least 1, only with "
            "streaming=true; a dataset in memory is shuffled as a whole"
        )
    if source.streaming and not _PLAIN_SPLIT.fullmatch(source.split):
        raise ConfigError(
            f"split={source.split}: a stream has no length to cut by; name a whole split, or set streaming=false"
        )
    kind, files = _local_files(source)
    preview = PREVIEW.get()
    if preview is not None:
        if kind is None and preview.local_only:
            raise ElsewhereError(f"source={source.source}: not on this machine")
        split = _PLAIN_SPLIT.match(source.split) if preview.local_only else None
        source = replace(source, split=split[0] if split else source.split, shuffle_buffer=None)
        # A stream reads no more of the files than is looked at; part of a split can only be found by reading the whole.
        source = replace(source, streaming=kind != "json" and _PLAIN_SPLIT.fullmatch(source.split) is not None)
        return read_stream(islice(_open(source, kind, files), preview.rows), source.label)
    return _open(source, kind, files)


def _open(source: Source, kind: str | None, files: FilesOfSplits) -> Any:
    if kind is None:
        return _load(source, str(user_path(source.source)), source.data_files, source.data_dir)
    if kind == "json" and not any(is_url(path) for paths in files.values() for path in paths):
        return _json_source(files, source)
    options = {"csv": _csv_options, "text": lambda files: {"encoding": "utf-8-sig"}}.get(kind, lambda files: {})
    # A file is that file, whatever its name: only what is asked for by a pattern is one, and those are resolved by now.
    literal = {split: [path if is_url(path) else escape(path) for path in paths] for split, paths in files.items()}
    return _load(source, kind, literal, None, options(files))


@dataclass(frozen=True)
class Preview:
    """Limits on reading a source: only its first rows, and with local_only nothing that needs a download."""

    rows: int
    local_only: bool = False


PREVIEW: ContextVar[Preview | None] = ContextVar("preview", default=None)


@contextmanager
def previewed(rows: int, *, local_only: bool = False) -> Iterator[None]:
    """A context in which every dataset holds only the first rows of its source, in memory; nothing is logged.

    local_only: a source that is not on this machine raises ElsewhereError.
    """
    token = PREVIEW.set(Preview(rows, local_only))
    try:
        yield
    finally:
        PREVIEW.reset(token)


class ArrowRows:
    """The rows of a `datasets.Dataset`, each passed through `without_filled`."""

    def __init__(self, rows: "datasets.Dataset") -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Row]:
        return map(without_filled, self._rows)


def without_filled(row: Row) -> dict[str, Any]:
    """Remove the nulls inside the column values of an Arrow table's row.

    In an Arrow table all structs of a column have the same fields: a field that a turn or a tool call lacks is null.
    """
    return {column: _without_nulls(value) for column, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _local_files(source: Source) -> tuple[str | None, FilesOfSplits]:
    """Return the kind of local file and the files of each split; (None, {}) for the hub and for folders."""
    if source.source in LOCAL_KINDS:
        if source.name is not None:
            raise ConfigError(
                f"name={source.name}: names a configuration of a hub dataset; '{source.source}' files have none: remove it, such as "
                "by ~dataset.name"
            )
        return source.source, listed_files(source.source, source.data_files, source.data_dir)
    path = user_path(source.source)
    if path.is_dir():
        return local_folder(path, source.name, source.data_files, source.data_dir)
    kind = kind_of(path)
    if kind is None:
        if path.is_file():
            raise ConfigError(
                f"source={source.source}: a file of no known kind; .json, .jsonl, .csv, .parquet and .txt are read: rename it, or give "
                f"source=text (or json, csv, parquet) and data_files={source.source}"
            )
        if source.source.startswith(("/", "./", "../", "~")):
            raise ElsewhereError(f"source={source.source}: no such file or folder")
        return None, {}
    for key, value in (("data_files", source.data_files), ("data_dir", source.data_dir), ("name", source.name)):
        if value is not None:
            raise ConfigError(
                f"{key}={value}: has no effect when source is a file ({source.source}); remove it, such as by ~dataset.{key}"
            )
    if not path.is_file():
        raise ElsewhereError(f"source={source.source}: no such file")
    return kind, {"train": [str(path)]}


def _load(
    source: Source,
    path: str,
    data_files: DataFiles | FilesOfSplits | None,
    data_dir: str | None,
    options: Mapping[str, Any] | None = None,
) -> Any:
    """Load rows by `datasets.load_dataset`; its errors are raised as DataError."""
    import datasets

    try:
        with _named_errors(source.label):
            rows = datasets.load_dataset(
                path,
                source.name,
                split=source.split,
                data_files=data_files,
                data_dir=data_dir,
                streaming=source.streaming,
                **(options or {}),
            )
            return rows.map(without_filled) if source.streaming else ArrowRows(rows)
    except StopIteration as error:  # what load_dataset lets out for a file without rows
        raise DataError(empty_text(source.label)) from error
    except DataError as error:
        if "corresponds to no data" in str(error):  # the same for a CSV file of its header alone
            raise DataError(empty_text(source.label)) from error
        raise


def empty_text(label: str) -> str:
    """Return the message for a source without rows."""
    return f"{label}: the dataset is empty (0 rows); check source, split and data_files"


@contextmanager
def _named_errors(label: str) -> Iterator[None]:
    """Turn errors of `datasets` and its readers into a DataError that names the source."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    # ValueError: unknown splits, malformed files (pyarrow's and pandas' errors are ValueErrors); OSError: hub and disk.
    except (ValueError, OSError, DatasetsError) as error:
        raise DataError(f"{label}: {_innermost(error)}") from error


def read_stream(rows: Iterable[Row], label: str) -> Iterator[Row]:
    """Yield the rows of a stream; a read error is raised as a DataError that names the source."""
    with _named_errors(label):
        yield from rows


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error) or type(error).__name__


def _csv_options(files: FilesOfSplits) -> dict[str, Any]:
    """Return options that read every CSV cell as the text it holds: no "007" -> 7, no "None" -> null."""
    from datasets import Features, Value

    first = next(iter(files.values()))[0]
    with _text(first, newline="") as file:
        header = next(csv.reader(file), None)
    if not header:
        raise DataError(f"{first}: the file is empty; the first line of a CSV file names its columns")
    return {"keep_default_na": False, "features": Features({name: Value("string") for name in header})}


@contextmanager
def _text(path: str, newline: str | None = None) -> Iterator[IO[str]]:
    """Open a text file, possibly gzipped; read errors are raised as a DataError that names it."""
    try:
        opener: Any = gzip.open if path.endswith(".gz") else open
        with opener(path, "rt", encoding="utf-8-sig", newline=newline) as file:
            yield file
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text: {error}") from error
    except (OSError, EOFError, zlib.error, csv.Error) as error:  # the first three: gzip of a broken file
        raise DataError(f"{path}: cannot be read: {error}; the file may be cut off or corrupt") from error


def read_lines(path: str) -> list[str]:
    """Yield the lines of a text file, possibly gzipped, without line ends.

    A line ends with a line feed, a carriage return or both; other characters that break lines on paper are text.

    Raises:
        DataError: the file cannot be read, or is not UTF-8.
    """
    with _text(path) as file:
        return [line.removesuffix("\n") for line in file]


def _json_source(files: FilesOfSplits, source: Source) -> Any:
    """Read rows of local JSON files by the standard library.

    `datasets` infers one type for a column from each file's first rows. If later rows or files differ, it returns other
    values than the file holds (text wrapped in JSON quotes, seen with 5.2). Here a row is exactly what its line says.
    """
    if source.streaming:
        import datasets

        split_parts(source.split, files, source.label)
        return datasets.IterableDataset.from_generator(read_json, gen_kwargs={"paths": files[source.split]})
    return JsonRows(files, source.split, source.label)


class JsonRows:
    """The rows of a split (or split expression) of JSON files, parsed as they are iterated."""

    def __init__(self, files: FilesOfSplits, split: str, label: str) -> None:
        self._files = files
        whole = _PLAIN_SPLIT.fullmatch(split) is not None
        counts = {} if whole else {name: sum(1 for _ in read_json(paths)) for name, paths in files.items()}
        self._parts = split_parts(split, files, label, counts)

    def __iter__(self) -> Iterator[Row]:
        for name, start, stop in self._parts:
            yield from islice(read_json(self._files[name]), start, stop)


def split_parts(
    split: str, names: Collection[str], label: str, counts: Mapping[str, int] | None = None
) -> list[tuple[str, int, int | None]]:
    """Parse a split expression into (split name, first row, end row) parts; a plain name needs no counts (end row: None).

    Raises:
        DataError: a split is unknown (the message lists those there are), or the expression cannot be read.
    """
    if _PLAIN_SPLIT.fullmatch(split):
        if split not in names:
            raise DataError(f"{label}: unknown split '{split}'; available: {', '.join(names)}")
        return [(split, 0, None)]
    from datasets import ReadInstruction

    with _named_errors(label):
        parts = ReadInstruction.from_spec(split).to_absolute(dict(counts or {}))
    return [(part.splitname, part.from_, part.to) for part in parts]


def read_json(paths: Iterable[str]) -> Iterator[Row]:
    """Yield the rows of JSON files (possibly gzipped): one object per line, or one array of objects.

    Raises:
        DataError: a file is not valid JSON or a row is not an object; the message names file and line.
    """
    for path in paths:
        with _text(path) as file:
            yield from _json_array(path, file) if _starts_array(file) else _json_lines(path, file)


def _starts_array(file: IO[str]) -> bool:
    first = next((line for line in file if line.strip()), "")
    file.seek(0)
    return first.lstrip().startswith("[")


def _json_lines(path: str, file: IO[str]) -> Iterator[Row]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            place = f"{path}, line {number}"
            with _json_errors(place):
                row = json.loads(line)
            yield _json_row(row, place)


def _json_array(path: str, file: IO[str]) -> Iterator[Row]:
    with _json_errors(path, count_lines=True):
        rows = json.load(file)
    for number, row in enumerate(rows, start=1):
        yield _json_row(row, f"{path}, element {number}")


@contextmanager
def _json_errors(place: str, *, count_lines: bool = False) -> Iterator[None]:
    try:
        yield
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if count_lines else ""
        raise DataError(f"{place}{line}: invalid JSON: {error.msg} at column {error.colno}") from error
    except UnicodeDecodeError:
        raise
    except (RecursionError, ValueError) as error:  # ValueError: a number of thousands of digits
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise DataError(f"{place}: JSON that cannot be read: {reason}; take the row out") from error


def _json_row(row: object, place: str) -> Row:
    if not isinstance(row, dict):
        raise DataError(f"{place}: a row must be a JSON object: found {type_name(row)}")
    return row
