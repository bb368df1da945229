"""Fetch one file over HTTP into a partial file: resumed after a failure, hashed on the way, renamed when correct.

huggingface_hub resumes only within one process (its partial files have random names), checks sizes but no hashes, and
reads responses of any size, hence this module. Its session does the rest: proxies, TLS, and dropping the token when a
redirect leads to another host. Nothing is read beyond the size that the repository announces.
"""

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import IO, Any

from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]
from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

from kdtune.download.record import size_text
from kdtune.errors import CheckpointError
from kdtune.log import get_logger

_CHUNK_BYTES = 1 << 20
_TIMEOUT_S = 30.0
# A server that sends less than this many bytes in that time has stalled, however steadily they drip.
_STALL_S = 60.0
_STALL_BYTES = 16_384
_TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_MAX_FAILURES = 5
_BACKOFF_S = 1.0
_LONGEST_WAIT_S = 30.0
_LONGEST_ASKED_WAIT_S = 300.0

# The HTTP client's own base of connection errors (httpx or httpx2, by the version of huggingface_hub), and those of them
# that asking again does not mend.
TransportError = HTTPError
_LASTING = ("UnsupportedProtocol", "TooManyRedirects", "LocalProtocolError", "DecodingError")

_log = get_logger("kdtune.download")


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository. `digest` is the sha256 of large (LFS) files, else the git blob sha1."""

    path: str
    size: int
    digest: str


class StalledError(TransportError):
    """A server sends almost nothing."""


class AnswerError(Exception):
    """A server responded with a status of 400 or more."""

    def __init__(self, status: int, code: str = "", retry_after: float | None = None) -> None:
        super().__init__(f"HTTP {status}")
        self.status = status
        self.code = code
        """The hub's error code (X-Error-Code), such as GatedRepo."""
        self.retry_after = retry_after
        """Seconds to wait before a retry (Retry-After)."""


@contextmanager
def answer_to(url: str, headers: Mapping[str, str]) -> Iterator[Any]:
    """Yield the HTTP client's response to a GET, unread; what the block leaves unread is not fetched.

    Raises:
        AnswerError: the status is 400 or more. The body is not read: it may have any size and type.
        TransportError: there is no response.
    """
    with get_session().stream("GET", url, headers=headers, timeout=_TIMEOUT_S, follow_redirects=True) as response:
        if response.status_code >= 400:
            code, wait = response.headers.get("X-Error-Code", ""), response.headers.get("Retry-After", "")
            raise AnswerError(response.status_code, code, _seconds(wait))
        yield response


def received(response: Any) -> Iterator[bytes]:
    """Yield the body of a response as it arrives; with a chunk size, a broken transfer would lose an unfilled chunk.

    Raises:
        StalledError: it arrives too slowly.
        TransportError: it breaks off.
    """
    start, num_bytes = time.monotonic(), 0
    for chunk in response.iter_bytes():
        num_bytes += len(chunk)
        if time.monotonic() - start > _STALL_S:
            if num_bytes < _STALL_BYTES:
                raise StalledError(f"it sends too slowly: {num_bytes} bytes in {_STALL_S:g} s")
            start, num_bytes = time.monotonic(), 0
        yield chunk


def fetch(
    url: str, target: Path, part: Path, file: RemoteFile, headers: Mapping[str, str], advance: Callable[[int], object]
) -> None:
    """Write `file` to `target` by way of the partial file `part`, which is resumed; call `advance` with the bytes got (or lost).

    A complete file with the wrong hash is fetched once more from its first byte.

    Raises:
        CheckpointError: the content does not match the repository's hash, or the connection keeps breaking.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for _attempt in range(2):
        with part.open("ab+") as handle:
            content = _Content(handle, file, advance)
            _fill(content, url, file, headers)
            os.fsync(handle.fileno())
        if content.size > file.size:
            part.unlink()
            raise CheckpointError(
                f"{file.path}: the server sends more than the {file.size} bytes that the repository announces; "
                "nothing of it was kept: try again, or ask whoever runs the server"
            )
        found = content.hexdigest()
        if (content.size, found) == (file.size, file.digest):
            os.replace(part, target)
            return
        advance(-content.size)
        part.unlink()
    raise CheckpointError(
        f"{file.path}: hash mismatch: got {found} ({content.size} bytes), the repository says {file.digest} "
        f"({file.size} bytes); it was removed: try again, or ask whoever runs the server"
    )


def file_digest(path: Path, file: RemoteFile) -> str:
    """Return the hash of the file at `path`, of the same kind as `file.digest`."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, lambda: _new_hash(file)).hexdigest()


def is_transient(error: Exception) -> bool:
    """Return whether a retry may help: a dropped or refused connection, a time-out, or a status that asks to try again."""
    if isinstance(error, AnswerError):
        return error.status in _TRANSIENT_STATUS
    return type(error).__name__ not in _LASTING


def wait_before_retry(failures: int, error: Exception | None) -> None:
    """Sleep one second, then two, four, ... up to thirty, or as long as the server asks, up to five minutes.

    Raises:
        CheckpointError: the server asks for more.
    """
    asked = error.retry_after if isinstance(error, AnswerError) else None
    if asked is not None and asked > _LONGEST_ASKED_WAIT_S:
        raise CheckpointError(
            f"the server answers {error} and wants to be asked again in {asked:.0f} s; start the same command then: "
            "what has been downloaded is kept"
        )
    if asked:
        _log.warning("the server answers %s and asks to wait %.0f s", error, asked)
    time.sleep(max(min(_BACKOFF_S * 2**failures, _LONGEST_WAIT_S), asked or 0.0))


def _seconds(retry_after: str) -> float | None:
    """Parse a Retry-After header (a number of seconds or a date) into seconds from now; None if it is neither."""
    if re.fullmatch(r"[0-9]{1,9}", retry_after):
        return float(retry_after)
    try:
        until = parsedate_to_datetime(retry_after)
    except ValueError:
        return None
    return max(0.0, (until if until.tzinfo else until.replace(tzinfo=UTC)).timestamp() - datetime.now(UTC).timestamp())


class _Content:
    """The bytes gathered so far and their running hash."""

    def __init__(self, handle: IO[bytes], file: RemoteFile, advance: Callable[[int], object]) -> None:
        self._handle, self._file, self._advance = handle, file, advance
        self._hasher, self.size = _new_hash(file), 0
        handle.seek(0)
        while chunk := handle.read(_CHUNK_BYTES):
            self._count(chunk)
        if self.size > file.size:
            self.restart()

    def append(self, chunk: bytes) -> None:
        self._handle.write(chunk)
        self._count(chunk)

    def restart(self) -> None:
        self._handle.truncate(0)
        self._advance(-self.size)
        self._hasher, self.size = _new_hash(self._file), 0

    def hexdigest(self) -> str:
        return self._hasher.hexdigest()

    def _count(self, chunk: bytes) -> None:
        self._hasher.update(chunk)
        self.size += len(chunk)
        self._advance(len(chunk))


def _fill(content: _Content, url: str, file: RemoteFile, headers: Mapping[str, str]) -> None:
    """Receive until all bytes are there; give up after five consecutive failures without notable progress."""
    failures = 0
    while content.size < file.size:
        before, broken = content.size, None
        try:
            _receive(content, url, file, headers)
        except (TransportError, AnswerError) as error:
            if not is_transient(error):
                raise
            broken = error
        if content.size >= file.size:
            return
        # Any byte is new, but a file does not come a few bytes an answer.
        failures = 0 if content.size - before > _STALL_BYTES else failures + 1
        if failures >= _MAX_FAILURES:
            if broken is not None:
                raise broken
            raise CheckpointError(
                f"{file.path}: the server ends it at {content.size} of {file.size} bytes; try again later"
            )
        if not isinstance(broken, AnswerError):
            what = f"the connection is dropped, {broken}" if isinstance(broken, StalledError) else "connection broke"
            _log.warning("%s: %s at %s; continuing from there", file.path, what, size_text(content.size))
        wait_before_retry(failures, broken)


def _receive(content: _Content, url: str, file: RemoteFile, headers: Mapping[str, str]) -> None:
    """Request the missing bytes once. Compression is declined, because byte ranges would then count compressed bytes."""
    asked = {**headers, "Accept-Encoding": "identity"}
    if content.size:
        asked["Range"] = f"bytes={content.size}-"
    try:
        with answer_to(url, asked) as response:
            continues = response.headers.get("Content-Range", "").startswith(f"bytes {content.size}-")
            if content.size and not (response.status_code == 206 and continues):
                content.restart()
                if response.status_code == 206:
                    return
            for chunk in received(response):
                content.append(chunk[: file.size + 1 - content.size])
                if content.size > file.size:
                    return
    except AnswerError as error:
        if error.status != 416:
            raise
        content.restart()


def _new_hash(file: RemoteFile) -> "hashlib._Hash":
    if len(file.digest) == 64:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
