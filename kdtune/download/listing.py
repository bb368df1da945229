"""List a hub repository: the commit, and the files with their sizes and hashes.

huggingface_hub's own client reads a response of any size, parses it unchecked, and follows a next page to any host
with the token, hence this module.
"""

import json
import re
import reprlib
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from kdtune.download.fetch import (
    AnswerError,
    RemoteFile,
    TransportError,
    answer_to,
    is_transient,
    received,
    wait_before_retry,
)
from kdtune.errors import CheckpointError
from kdtune.escape import printable

_MAX_FAILURES = 3
# The hub lists 1,000 files a page, in less than 1 MB.
_MOST_BYTES = 32 * 2**20
_MOST_PAGES = 1000


def list_files(
    repo: str, revision: str | None, endpoint: str, headers: Mapping[str, str]
) -> tuple[str, list[RemoteFile]]:
    """Return the commit that `revision` (None: main) names, and the files in it.

    Raises:
        AnswerError, TransportError: the last attempt failed.
        CheckpointError: the response is not a hub's.
    """
    validate_repo_id(repo)
    api = f"{endpoint}/api/models/{repo}"
    url = f"{api}/revision/{quote(revision, safe='')}" if revision else api
    info, _ = _answer(url, headers)
    commit = (info.get("sha") if isinstance(info, dict) else None) or revision or "main"
    if not isinstance(info, dict) or not isinstance(commit, str) or printable(commit) != commit:
        raise _no_hub(url, f"found {reprlib.repr(info)}")
    files: list[RemoteFile] = []
    page: str | None = f"{api}/tree/{quote(commit, safe='')}?recursive=true"
    for _ in range(_MOST_PAGES):
        if page is None:
            return commit, files
        entries, following = _answer(page, headers)
        if not isinstance(entries, list):
            raise _no_hub(page, f"found {reprlib.repr(entries)}")
        files += [_file(entry, page) for entry in entries if not _is_folder(entry)]
        page = following
    raise _no_hub(api, f"the list of files goes on after {_MOST_PAGES} pages")


def _file(entry: Any, url: str) -> RemoteFile:
    try:
        lfs = entry.get("lfs")
        path, size, digest = entry["path"], entry["size"], lfs["oid"] if lfs else entry["oid"]
        is_known = isinstance(path, str) and type(size) is int and size >= 0
        if is_known and re.fullmatch(r"[0-9a-f]{64}" if lfs else r"[0-9a-f]{40}", digest):
            return RemoteFile(path, size, digest)
    except (AttributeError, KeyError, TypeError):
        pass
    raise _no_hub(url, f"found {reprlib.repr(entry)} as a file")


def _is_folder(entry: Any) -> bool:
    return isinstance(entry, dict) and entry.get("type") == "directory"


def _answer(url: str, headers: Mapping[str, str]) -> tuple[Any, str | None]:
    """Return the JSON at the address, and the address of the next page, if any."""
    for failures in range(_MAX_FAILURES):
        try:
            return _read(url, headers)
        except (TransportError, AnswerError) as error:
            if failures == _MAX_FAILURES - 1 or not is_transient(error):
                raise
            wait_before_retry(failures, error)
    raise AssertionError("the last failure is raised")


def _read(url: str, headers: Mapping[str, str]) -> tuple[Any, str | None]:
    body = bytearray()
    with answer_to(url, headers) as response:
        for chunk in received(response):
            body += chunk
            if len(body) > _MOST_BYTES:
                raise _no_hub(url, f"more than {_MOST_BYTES} bytes")
        following = response.links.get("next", {}).get("url")
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        reason = "too deeply nested" if isinstance(error, RecursionError) else str(error)
        raise _no_hub(url, f"no JSON: {reason}") from None
    if following is not None:
        following = urljoin(url, following)
        if urlsplit(following)[:2] != urlsplit(url)[:2]:
            raise _no_hub(url, f"its next page is at another server, {reprlib.repr(following)}")
    return found, following


def _no_hub(url: str, found: str) -> CheckpointError:
    path = urlsplit(url).path
    return CheckpointError(
        f"{path}: what the server answers is not what a hub answers ({found}); check HF_ENDPOINT, if it is set, and try again"
    )
