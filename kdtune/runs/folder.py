"""The output folder of a run: whether it may be used, and its lock."""

import os
from collections.abc import Callable
from pathlib import Path

from kdtune.checkpoint.atomic import try_lock
from kdtune.errors import ConfigError
from kdtune.log import get_logger
from kdtune.paths import user_path

log = get_logger(__name__)

_TRACES = ("config.yaml", "metrics.jsonl", "final")
_IN_USE = "another run is writing there; wait for it, stop it, or choose another output_dir"
LOCK = ".lock"
_held: dict[Path, int] = {}


def holds_run(output_dir: Path) -> bool:
    """Return whether the folder has traces of a run: its config, metrics, a step folder or a final model."""
    return any((output_dir / name).exists() for name in _TRACES) or any(output_dir.glob("step_*"))


def output_dir_problems(output_dir: str, *, resume: bool) -> list[str]:
    """Return reasons why a run cannot write to the folder; write nothing."""
    return _problems(output_dir, lambda folder: _run_problems(folder, resume=resume))


def writing_problems(output_dir: str) -> list[str]:
    """Return reasons why files cannot be written to the folder; it may hold other things, a run in progress too."""
    return _problems(output_dir, _writing_problems)


def _problems(output_dir: str, look: Callable[[Path], list[str]]) -> list[str]:
    try:
        return look(user_path(output_dir))
    except (OSError, ValueError) as error:  # a name that is too long, or has a null character
        reason = error.strerror if isinstance(error, OSError) else str(error)
        return [f"output_dir={output_dir!r}: {reason}; choose another output_dir"]


def new_folder_problems(output_dir: str) -> list[str]:
    """Return why a recipe that writes its folder at its end could not do so; writes nothing."""
    found = output_dir_problems(output_dir, resume=True)
    folder = user_path(output_dir)
    if found or not folder.exists():
        return found
    try:
        first = min((entry.name for entry in folder.iterdir()), default=None)
    except OSError as error:
        return [f"output_dir={output_dir}: {error.strerror}; choose another output_dir"]
    if first is None:
        return []
    what = "already holds a run" if holds_run(folder) else f"is not empty (holds {first!r})"
    return [f"output_dir={output_dir}: {what}; choose another output_dir"]


def _run_problems(folder: Path, *, resume: bool) -> list[str]:
    if folder.is_dir() and _is_locked(folder):
        return [f"output_dir={folder}: {_IN_USE}"]
    if folder.is_dir() and not resume and holds_run(folder):
        return [
            f"output_dir={folder}: already holds a run; resume it with resume_from_checkpoint=true, "
            "or choose another output_dir"
        ]
    return _writing_problems(folder)


def _writing_problems(folder: Path) -> list[str]:
    if folder.exists() and not folder.is_dir():
        return [f"output_dir={folder}: is a file; name a folder"]
    parent = folder
    while not parent.exists():
        parent = parent.parent
    # Even root cannot write to a read-only mount.
    is_mounted_read_only = hasattr(os, "statvfs") and bool(os.statvfs(parent).f_flag & os.ST_RDONLY)
    if is_mounted_read_only or not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        return [f"output_dir={folder}: {parent} is not a folder that can be written to; choose another output_dir"]
    return []


def lock(folder: Path) -> None:
    """Hold the lock on the folder until this process ends, however it ends.

    A file in it is locked, not the folder: NFS propagates only locks of files, opened for writing, to other hosts.
    """
    path = folder.absolute()
    if path in _held:
        return
    descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    is_locked = try_lock(descriptor)
    if is_locked is False:
        os.close(descriptor)
        raise ConfigError(f"output_dir={folder}: {_IN_USE}")
    if is_locked is None:
        log.warning("%s: its file system has no locks; a second run there would not be noticed", folder)
    _held[path] = descriptor


def _release() -> None:
    """Release the lock in a forked child, such as a data worker, which must not hold it after its parent was killed."""
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_release)


def _is_locked(folder: Path) -> bool:
    """Return whether another process holds the folder."""
    if folder.absolute() in _held:
        return False
    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY)
    except OSError:  # no run has been there; what may not be read is told by the other checks
        return False
    try:
        return try_lock(descriptor, shared=True) is False  # the processes of one run look at the same time
    finally:
        os.close(descriptor)
