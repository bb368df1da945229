"""A cache of tokenized datasets on disk, by content: the same rows, settings and tokenizer are tokenized once.

A file's name is a hash of all that an example depends on, so a file is never out of date: a changed row, argument, template, date or
tokenizer has another name. Files are written under another name and then renamed; several processes may write the same one.
"""

import hashlib
import json
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np

from kdtune.config.check import COMPONENT, is_ours
from kdtune.data.columns import Row
from kdtune.data.dataset import DatasetStats, TokenizedDataset
from kdtune.errors import DataError
from kdtune.log import get_logger
from kdtune.paths import user_path
from kdtune.tokenizers.chat_format import today

if TYPE_CHECKING:
    from kdtune.tokenizers import Tokenizer

log = get_logger(__name__)

FEWEST_ROWS = 1_000
"""Fewer rows, which take less than a second, are tokenized each time."""
DAYS_KEPT = 90
"""A file that was not used for longer is deleted when another one is written."""
_SUFFIX = ".npz"
# Of a file, and of one that is being written.
_OURS = re.compile(r"[0-9a-f]{64}(\.npz|\..*\.part)")


@dataclass
class _Cache:
    folder: Path
    settings: str
    """Hash of the dataset's config node and of the tokenizer."""
    used: int = 0
    """Number of datasets tokenized under it so far: a mixture's have one node and may have the same rows."""


_CACHE: ContextVar[_Cache | None] = ContextVar("tokenized_cache", default=None)


@contextmanager
def tokenized_cache(
    folder: str | Path | None, node: Mapping[str, Any] | None, tokenizer: "Tokenizer"
) -> Iterator[None]:
    """A context in which a dataset built from a config `node` and its `tokenizer` is read from the `folder`, or kept there.

    Nothing is cached with None, and where a function of one's own takes part, whose result a hash of the config cannot stand for:
    a component, filter or tokenizer that is not kdtune's, or a teacher with another tokenizer.
    """
    is_known = type(tokenizer).__module__.startswith("kdtune.") and getattr(tokenizer, "pair", None) is None
    found = None
    if folder is not None and node is not None and is_known and not _has_own_code(node):
        found = _Cache(user_path(folder), _hashed(_code_hash(), node, _tokenizer_hash(tokenizer)))
    token = _CACHE.set(found)
    try:
        yield
    finally:
        _CACHE.reset(token)


def cache_file(rows: Iterable[Row]) -> Path | None:
    """Return the file for these rows, which are read for it, in the present context; None if they are not to be cached.

    Called once for each dataset that is tokenized. Rows that can be iterated over only once are not cached.
    """
    present = _CACHE.get()
    if present is None:
        return None
    present.used += 1
    found, count = hashlib.sha256(), 0
    if iter(rows) is rows:
        return None
    try:
        for row in rows:
            found.update(json.dumps(row).encode() + b"\n")
            count += 1
    except (
        TypeError,
        DataError,
    ):  # a value that JSON does not have; a file that cannot be read, which is told in its turn
        return None
    if count < FEWEST_ROWS:
        return None
    return present.folder / f"{_hashed(present.settings, present.used, found.hexdigest())}{_SUFFIX}"


def read_tokenized(file: Path | None, *, is_chat: bool) -> TokenizedDataset | None:
    """Return the dataset in the file; None if there is none, or if it is damaged, which is logged."""
    if file is None or not file.is_file():
        return None
    try:
        with np.load(file, allow_pickle=False) as stored:
            ids, trained, ends, report, routes = (
                stored[name] for name in ("ids", "trained", "ends", "report", "routes")
            )
        values = json.loads(report.tobytes())
        counters = {name: Counter(values[name]) for name in ("remarks", "unread")}
        stats, values_of_column = DatasetStats(**{**values, **counters}), json.loads(routes.tobytes())
        found = TokenizedDataset.of_arrays(ids, trained, ends, stats, is_chat=is_chat, routes=values_of_column)
        size = file.stat().st_size
        _mark_used(file)
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile) as error:
        what = "cannot be read" if isinstance(error, OSError) else "damaged"
        log.warning("%s: %s (%s); the rows are tokenized again", file, what, error)
        return None
    log.info("tokenized before: %s (%.1f MB)", file, size / 1e6)
    return found


def write_tokenized(file: Path | None, dataset: TokenizedDataset) -> None:
    """Keep the dataset in the file, whole or not at all; a folder that cannot be written is logged."""
    if file is None:
        return
    ids, trained, ends = dataset.arrays()
    report, routes = (
        np.frombuffer(json.dumps(one).encode(), dtype=np.uint8) for one in (vars(dataset.report), dataset.routes)
    )
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, part = tempfile.mkstemp(dir=file.parent, prefix=f"{file.stem}.", suffix=".part")
        try:
            with os.fdopen(descriptor, "wb") as opened:
                np.savez(opened, ids=ids, trained=trained, ends=ends, report=report, routes=routes)
            os.chmod(part, 0o666 & ~_umask())
            os.replace(part, file)
        except BaseException:
            os.unlink(part)
            raise
    except OSError as error:
        log.warning("%s: the tokenized rows cannot be kept: %s", file, error)
        return
    log.info("kept tokenized: %s (%.1f MB)", file, sum(one.nbytes for one in (ids, trained, ends)) / 1e6)
    _delete_unused(file.parent)


def _mark_used(file: Path) -> None:
    with suppress(OSError):  # another user's, or on a disk that cannot be written
        os.utime(file)


def _delete_unused(folder: Path) -> None:
    """Delete files that no run has read or written for DAYS_KEPT days, and parts that a killed run left."""
    for file in folder.iterdir():
        if not _OURS.fullmatch(file.name):
            continue
        with suppress(OSError):  # another run was faster, or it is another user's
            if time.time() - file.stat().st_mtime > DAYS_KEPT * 86_400:
                file.unlink()
                log.info("deleted, not used for %d days: %s", DAYS_KEPT, file)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def _has_own_code(value: Any) -> bool:
    """Return whether a config value names a component or filter that is not kdtune's, at any depth."""
    if isinstance(value, Mapping):
        is_own = (COMPONENT in value and not is_ours(value)) or value.get("filter_fn") is not None
        return is_own or any(map(_has_own_code, value.values()))
    return isinstance(value, list | tuple) and any(map(_has_own_code, value))


def _tokenizer_hash(tokenizer: "Tokenizer") -> str:
    """Hash the tokenizer's files as it would save them, and what it was given beside them."""
    with tempfile.TemporaryDirectory() as name:
        tokenizer.save(Path(name))
        files = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(Path(name).iterdir())}
    date = tokenizer.date or (today() if tokenizer.asks_date else None)
    return _hashed(
        type(tokenizer).__qualname__, files, tokenizer.chat_template, tokenizer.tool_template, date, tokenizer.max_seq_len,
        sorted(tokenizer.stop_ids), tokenizer.begins_with_bos, tokenizer.chat_template_kwargs,
    )  # fmt: skip


@cache
def _code_hash() -> str:
    """Hash the source of what tokenizes, and the versions of its libraries."""
    package = Path(__file__).parents[1]
    files = sorted(file for part in ("data", "tokenizers") for file in (package / part).glob("*.py"))
    versions = [metadata.version(name) for name in ("tokenizers", "jinja2", "sentencepiece")]
    return _hashed([hashlib.sha256(file.read_bytes()).hexdigest() for file in files], versions)


def _hashed(*parts: Any) -> str:
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
