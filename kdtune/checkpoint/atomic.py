"""Write folders and files atomically: they are complete or absent, whenever the process is killed."""

import fcntl
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from torch.distributed import ProcessGroup

from kdtune.distributed import broadcast_object, is_rank_zero, raise_on_all_ranks
from kdtune.errors import CheckpointError
from kdtune.paths import user_path

# `.step_10.partial-host-4711-1f3a9c02`: hidden, beside its target so that a rename never crosses file systems, and with the
# owner's host and process id inside.
_HIDDEN = re.compile(r"^\..+\.(?:partial|deleted)-(?P<host>.+)-(?P<pid>\d+)-[0-9a-f]{8}$")
# A file that another host has not touched for this long is not being written.
_STALE_SECONDS = 24 * 3600
_in_use: set[Path] = set()


@contextmanager
def atomic_folder(path: str | Path, *, group: ProcessGroup | None = None) -> Iterator[Path]:
    """Yield an empty hidden folder beside `path`; when the block ends without an error it becomes `path`.

    Everything in it is flushed to disk before the rename, so `path` never exists half written. An error removes the
    hidden folder; a killed process leaves it to `clean_leftovers`. Missing parents are made. On
    several processes that share a file system, all of them enter the block; the folder is renamed when all have left it, and an
    error on one is raised on all. They communicate in the process group `group` (None: the run's).

    Raises:
        CheckpointError: `path` is a file or a folder with something in it, or the disk is full or cannot be written.
    """
    target = user_path(path).absolute()
    with raise_on_all_ranks(group):
        if is_rank_zero():
            _refuse_existing(target)
    hidden = broadcast_object(_hidden_sibling(target, "partial"), group)
    _in_use.add(hidden)
    try:
        with raise_on_all_ranks(group), writing(target):
            if is_rank_zero():
                hidden.mkdir(parents=True)
        with raise_on_all_ranks(group), writing(target):
            yield hidden
        with raise_on_all_ranks(group), writing(target):
            if is_rank_zero():
                _sync_tree(hidden)
                # Someone may have made the target meanwhile: rename replaces an empty folder and refuses any other.
                hidden.rename(target)
                sync(target.parent)
    except CheckpointError as error:
        # The error inside has the hidden name, which no longer exists when the message is read.
        raise CheckpointError(str(error).replace(str(hidden), str(target))) from error
    finally:
        _in_use.discard(hidden)
        if is_rank_zero():
            shutil.rmtree(hidden, ignore_errors=True)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file atomically: a reader sees the old content or the new, never a part. Replaces an existing file.

    Lone surrogates, which UTF-8 does not have, are written as JSON escapes them.

    Raises:
        CheckpointError: the disk is full or cannot be written.
    """
    with atomic_file(path) as hidden:
        hidden.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield the path of a hidden file beside `path` to be written; when the block ends without an error it becomes `path`.

    A reader sees the old content or the new, never a part. Missing parents are made, an existing file is replaced.

    Raises:
        CheckpointError: the disk is full or cannot be written.
    """
    target = user_path(path).absolute()
    hidden = _hidden_sibling(target, "partial")
    _in_use.add(hidden)
    try:
        with writing(target):
            hidden.parent.mkdir(parents=True, exist_ok=True)
            yield hidden
            sync(hidden)
            hidden.replace(target)
            sync(target.parent)
    finally:
        _in_use.discard(hidden)
        with suppress(OSError):  # gone on success; where nothing can be written there is nothing to remove
            hidden.unlink()


def remove_folder(path: str | Path) -> None:
    """Delete a folder and its content. It is renamed first, so that a killed deletion leaves no partial folder under its name."""
    target = user_path(path).absolute()
    hidden = _hidden_sibling(target, "deleted")
    with writing(target):
        target.rename(hidden)
        shutil.rmtree(hidden)


def clean_leftovers(parent: str | Path) -> list[Path]:
    """Removes the hidden folders and files that killed processes left in `parent`, and returns what it removed.

    Keeps what a running process of this machine is writing, and what another machine has changed within a day. A missing
    `parent` is not an error.
    """
    folder = user_path(parent).absolute()
    removed = []
    for entry in sorted(folder.iterdir()) if folder.is_dir() else []:
        match = _HIDDEN.match(entry.name)
        if match is None or entry in _in_use:
            continue
        pid = int(match["pid"])
        # Ids are reused: our own id marks an earlier process.
        if (pid != os.getpid() and is_running(pid)) if match["host"] == _host() else _is_fresh(entry):
            continue
        with writing(entry):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        removed.append(entry)
    return removed


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the errors of a full, read-only or failing disk into a CheckpointError that names `path`."""
    try:
        yield
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        reason = f"{error.strerror or error}{place}"
        raise CheckpointError(f"{path}: cannot be written: {reason}; {_advice(error)}") from error
    except SafetensorError as error:
        # safetensors reports a full disk as its own error, with the system's text inside.
        advice = "free some space or choose another output_dir, then start again"
        raise CheckpointError(f"{path}: cannot be written: {error}; {advice}") from error


def _advice(error: OSError) -> str:
    if isinstance(error, PermissionError):
        return "choose an output_dir that you may write to"
    if isinstance(error, FileExistsError | NotADirectoryError | IsADirectoryError):
        return "something else has that name: choose another output_dir"
    return "check that the disk has free space and is not read-only, or choose another output_dir, then start again"


def _refuse_existing(target: Path) -> None:
    if target.is_dir():
        found = next(target.iterdir(), None)
        if found is None:
            return
        what = f"exists and is not empty (holds {found.name!r})"
    elif os.path.lexists(target):
        what = "exists and is a file"
    else:
        return
    raise CheckpointError(f"{target}: {what}; nothing is overwritten: choose another folder or move this one away")


def _hidden_sibling(target: Path, purpose: str) -> Path:
    return target.with_name(f".{target.name}.{purpose}-{_host()}-{os.getpid()}-{uuid.uuid4().hex[:8]}")


def _host() -> str:
    # A file's name has at most 255 bytes.
    return socket.gethostname().replace("/", "_")[:64]


def _is_fresh(entry: Path) -> bool:
    """Return whether the file, or anything in the folder, has changed lately."""
    paths = [entry, *entry.rglob("*")] if entry.is_dir() else [entry]
    with suppress(FileNotFoundError):  # its owner has just finished it
        return max(path.lstat().st_mtime for path in paths) > time.time() - _STALE_SECONDS
    return True


def is_running(pid: int) -> bool:
    """Return whether a process of this machine has the id."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def try_lock(descriptor: int, *, shared: bool = False) -> bool | None:
    """Lock an open file without waiting; False if another process holds it, None if its file system has no locks.

    The lock is released when this process and those that inherited the descriptor have closed it, however they end.
    """
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _sync_tree(folder: Path) -> None:
    """Flushes every file and folder below `folder` to disk, contents before the folders that name them."""
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            sync(Path(root, name))
        sync(Path(root))


def sync(path: Path) -> None:
    """Flush the file or folder to disk and wait until it is there."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
