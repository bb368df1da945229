"""The result of a download, and the record by which a second run recognizes the files that are already complete."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

from kdtune.errors import CheckpointError
from kdtune.escape import printable

_STATE_DIR = ".kdtune-download"
_LOCK_WAIT_S = 0.2


@dataclass(frozen=True)
class Download:
    """A folder that holds everything requested: sizes in bytes by path, and which of them this run had to fetch."""

    source: str
    folder: Path
    files: dict[str, int]
    fetched: tuple[str, ...]
    left_out: tuple[str, ...] = ()


@dataclass
class Record:
    """The files of a folder known to be complete, each with its hash and its size and time when hashed."""

    folder: Path
    source: str
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, name: str, digest: str) -> None:
        """Record that `name` has the content with this `digest`, and write the record."""
        stat = (self.folder / name).stat()
        self.files[name] = {"digest": digest, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        path = _record_path(self.folder)
        path.parent.mkdir(exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps({"source": self.source, "files": self.files}, indent=1), encoding="utf-8")
        os.replace(part, path)

    def knows(self, name: str, digest: str) -> bool:
        """Return whether `name` is untouched since it was recorded with this `digest`."""
        noted, path = self.files.get(name), self.folder / name
        if noted is None or noted["digest"] != digest or not path.is_file():
            return False
        stat = path.stat()
        return (stat.st_size, stat.st_mtime_ns) == (noted["size"], noted["mtime_ns"])


def read_record(folder: Path, source: str) -> Record:
    """Read the record of `folder`; empty if there is none or it is unreadable (every file is then hashed again).

    Raises:
        CheckpointError: the folder was filled from another source; two models' files must not be mixed.
    """
    try:
        found = json.loads(_record_path(folder).read_text(encoding="utf-8-sig"))
        was, files = found["source"], dict(found["files"])
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return Record(folder, source)
    if was != source:
        raise CheckpointError(f"{folder}: holds {was}, not {source}; give another --output-dir or remove the folder")
    return Record(folder, source, files)


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Create `folder` and hold its lock; file system errors become one-line errors.

    Raises:
        CheckpointError: another process is downloading into the folder, it cannot be written, or the disk is full.
    """
    try:
        (folder / _STATE_DIR).mkdir(parents=True, exist_ok=True)
        with WeakFileLock(folder / _STATE_DIR / "lock", timeout=_LOCK_WAIT_S):
            yield
    except ConnectionError:  # an OSError too, but not of the file system
        raise
    except TimeoutError:
        raise CheckpointError(f"{folder}: another download is writing there; wait for it to end") from None
    except OSError as error:
        place = error.filename or folder
        raise CheckpointError(
            f"{place}: cannot be written: {error.strerror or type(error).__name__}; "
            "free some space or give an --output-dir you may write to"
        ) from None
    finally:
        _remove_if_unused(folder)


def target_in(folder: Path, name: str) -> Path:
    """Return the path of `name` below `folder`, for a name that comes from a server or an archive.

    Raises:
        CheckpointError: the name is absolute or leads out of the folder, or holds control characters.
    """
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or "\\" in name or ":" in parts[0] or ".." in parts or parts[0] == _STATE_DIR:
        raise CheckpointError(f"refused file name {name!r}: it does not name a file inside {folder}")
    if printable(name) != name or "\n" in name or "\t" in name:
        raise CheckpointError(
            f"refused file name {name!r}: it holds control characters; leave it out with --ignore-patterns"
        )
    return folder.joinpath(*parts)


def part_in(folder: Path, digest: str) -> Path:
    """Return a path for bytes that are not known to be complete yet; it collides with no file of a repository."""
    return folder / _STATE_DIR / f"{digest}.part"


def is_case_blind(folder: Path) -> bool:
    """Return whether the file system ignores case in names."""
    return (folder / _STATE_DIR.upper()).exists()


def remove_parts(folder: Path) -> None:
    """Remove partial files of earlier, interrupted downloads of other revisions."""
    for part in (folder / _STATE_DIR).glob("*.part"):
        part.unlink()


def default_output_dir(name: str) -> Path:
    """Return the default folder of a download: /tmp/NAME, without the owner, as in torchtune."""
    return Path("/tmp") / name.rsplit("/", 1)[-1]


def size_text(num_bytes: int) -> str:
    """Format a size for people: `877 B`, `2.5 GB` (powers of 1000, as on the hub)."""
    size = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _remove_if_unused(folder: Path) -> None:
    """Remove what a download that fetched nothing has made, so that an existing folder means a download."""
    if not _record_path(folder).exists():
        with suppress(OSError):  # rmdir refuses what is not empty, such as a folder with a part in it
            (folder / _STATE_DIR / "lock").unlink(missing_ok=True)
            (folder / _STATE_DIR).rmdir()
            folder.rmdir()


def _record_path(folder: Path) -> Path:
    return folder / _STATE_DIR / "record.json"


def downloaded_from(folder: Path) -> str | None:
    """Return the repository that `kdtune download` put into a folder, such as "meta-llama/Llama-3.2-1B-Instruct", or None."""
    try:
        source = json.loads(_record_path(folder).read_text(encoding="utf-8-sig"))["source"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return source if isinstance(source, str) else None
