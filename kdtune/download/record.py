"""What a download leaves behind: its result, and the record by which a second run knows the files it need not touch."""

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
    """A folder that holds everything asked for: sizes in bytes by path, and which of them this run had to fetch."""

    source: str
    folder: Path
    files: dict[str, int]
    fetched: tuple[str, ...]
    left_out: tuple[str, ...] = ()


@dataclass
class Record:
    """The files known to be whole in a folder, with the hash each had when its size and time were noted."""

    folder: Path
    source: str
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, name: str, digest: str) -> None:
        """Notes that `name` holds the content `digest` names, and writes the record."""
        stat = (self.folder / name).stat()
        self.files[name] = {"digest": digest, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        path = _record_path(self.folder)
        path.parent.mkdir(exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps({"source": self.source, "files": self.files}, indent=1), encoding="utf-8")
        os.replace(part, path)

    def knows(self, name: str, digest: str) -> bool:
        """True when `name` has not been touched since it was found to hold the content `digest` names."""
        noted, path = self.files.get(name), self.folder / name
        if noted is None or noted["digest"] != digest or not path.is_file():
            return False
        stat = path.stat()
        return (stat.st_size, stat.st_mtime_ns) == (noted["size"], noted["mtime_ns"])


def read_record(folder: Path, source: str) -> Record:
    """The record of `folder`, empty where there is none or it cannot be read (every file is then hashed again).

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
    """Makes `folder` and holds its lock; failures of the file system come out as one line.

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
    """The path of `name` below `folder`, for a name that a server or an archive gave.

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
    """Path for bytes that are not known to be complete yet; it collides with no file of a repository."""
    return folder / _STATE_DIR / f"{digest}.part"


def is_case_blind(folder: Path) -> bool:
    """Return whether the file system ignores case in names."""
    return (folder / _STATE_DIR.upper()).exists()


def remove_parts(folder: Path) -> None:
    """Takes away what earlier, broken downloads of other revisions have left."""
    for part in (folder / _STATE_DIR).glob("*.part"):
        part.unlink()


def default_output_dir(name: str) -> Path:
    """Where a download goes when no folder is given: /tmp/NAME, without the owner, as torchtune has it."""
    return Path("/tmp") / name.rsplit("/", 1)[-1]


def size_text(num_bytes: int) -> str:
    """A size for people: `877 B`, `2.5 GB` (powers of 1000, as the hub counts)."""
    size = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _remove_if_unused(folder: Path) -> None:
    """Takes away what a download that brought nothing has made, so that the folder's being there means something."""
    if not _record_path(folder).exists():
        with suppress(OSError):  # rmdir refuses what is not empty, such as a folder with a part in it
            (folder / _STATE_DIR / "lock").unlink(missing_ok=True)
            (folder / _STATE_DIR).rmdir()
            folder.rmdir()


def _record_path(folder: Path) -> Path:
    return folder / _STATE_DIR / "record.json"


def downloaded_from(folder: Path) -> str | None:
    """Name of the repository that `kdtune download` put into a folder, such as "meta-llama/Llama-3.2-1B-Instruct", or None."""
    try:
        source = json.loads(_record_path(folder).read_text(encoding="utf-8-sig"))["source"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return source if isinstance(source, str) else None
