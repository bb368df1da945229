"""One file over HTTP: gathered in NAME.part, resumed where it broke off, hashed on the way, renamed when it is right.

huggingface_hub resumes only within one process (its partial files carry random names) and checks sizes but no hashes;
hence this. Its session does the rest: proxies, TLS, and dropping the token when a redirect leads to another host.
"""

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]
from huggingface_hub.utils import get_session, hf_raise_for_status  # type: ignore[attr-defined]

from kdtune.download.record import part_of, size_text
from kdtune.errors import CheckpointError
from kdtune.log import get_logger

_CHUNK_BYTES = 1 << 20
_TIMEOUT_S = 30.0
_TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_MAX_FAILURES = 5
_BACKOFF_S = 1.0
_LONGEST_WAIT_S = 30.0

# The HTTP client's own base of connection errors (httpx or httpx2, by the version of huggingface_hub).
TransportError = HTTPError

_log = get_logger("kdtune.download")


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository. `digest` is the sha256 of large (LFS) files, else the git blob sha1."""

    path: str
    size: int
    digest: str


def fetch(
    url: str, target: Path, file: RemoteFile, headers: Mapping[str, str], advance: Callable[[int], object]
) -> None:
    """Writes `file` to `target`, going on from `target`.part if there is one; `advance` is told of bytes got (or lost).

    A whole file with the wrong hash is fetched once more from its first byte: a part left by an earlier revision.

    Raises:
        CheckpointError: the content is not what the repository promises, or the connection keeps breaking.
    """
    part = part_of(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    for _attempt in range(2):
        with part.open("ab+") as handle:
            content = _Content(handle, file, advance)
            _fill(content, url, file, headers)
            os.fsync(handle.fileno())
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
    """The hash of what `path` holds, of the kind that `file.digest` is."""
    hasher = _new_hash(file)
    with path.open("rb") as handle:
        while chunk := handle.read(_CHUNK_BYTES):
            hasher.update(chunk)
    return hasher.hexdigest()


def is_transient(error: TransportError) -> bool:
    """True for a dropped or refused connection, a time-out, and the statuses by which a server says: try again."""
    return not isinstance(error, HfHubHTTPError) or error.response.status_code in _TRANSIENT_STATUS


def wait_before_retry(failures: int) -> None:
    """Sleeps one second, then two, four, ... up to thirty."""
    time.sleep(min(_BACKOFF_S * 2**failures, _LONGEST_WAIT_S))


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
    """Receives until all bytes are there; five failures in a row that bring nothing new end it."""
    failures = 0
    while content.size < file.size:
        before, broken = content.size, None
        try:
            _receive(content, url, headers)
        except TransportError as error:
            if not is_transient(error):
                raise
            broken = error
        if content.size >= file.size:
            return
        failures = 0 if content.size > before else failures + 1
        if failures >= _MAX_FAILURES:
            if broken is not None:
                raise broken
            raise CheckpointError(
                f"{file.path}: the server ends it at {content.size} of {file.size} bytes; try again later"
            )
        _log.warning("%s: connection broke at %s; going on from there", file.path, size_text(content.size))
        wait_before_retry(failures)


def _receive(content: _Content, url: str, headers: Mapping[str, str]) -> None:
    """One request for what is missing. Compression is declined: it would make byte ranges mean something else."""
    asked = {**headers, "Accept-Encoding": "identity"}
    if content.size:
        asked["Range"] = f"bytes={content.size}-"
    with get_session().stream("GET", url, headers=asked, timeout=_TIMEOUT_S, follow_redirects=True) as response:
        if response.status_code >= 400:
            response.read()
            if response.status_code == 416:
                content.restart()
                return
            hf_raise_for_status(response)
        continues = response.headers.get("Content-Range", "").startswith(f"bytes {content.size}-")
        if content.size and not (response.status_code == 206 and continues):
            content.restart()
            if response.status_code == 206:
                return
        for (
            chunk
        ) in response.iter_bytes():  # as received: a chunk size would lose what it had not filled when the body breaks
            content.append(chunk)


def _new_hash(file: RemoteFile) -> "hashlib._Hash":
    if len(file.digest) == 64:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
