"""JSON lines files of a run: metrics.jsonl and samples.jsonl."""

from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from kdtune.checkpoint import atomic_write_text
from kdtune.json_files import read_json_lines, to_json
from kdtune.paths import user_path


class JSONLLogger:
    """Append one JSON object per line, `step` first, floats unrounded (a non-finite one as null), flushed at once.

    Without a path, as on all ranks but 0, it writes nothing.
    """

    def __init__(self, path: str | Path | None) -> None:
        self._file: IO[str] | None = None
        if path is not None:
            user_path(path).parent.mkdir(parents=True, exist_ok=True)
            self._file = user_path(path).open("a", encoding="utf-8", errors="backslashreplace")

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Append the step's values: numbers, or any other JSON value (such as a sample answer)."""
        if self._file is not None:
            self._file.write(to_json({"step": step, **values}) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file; everything logged is already in it."""
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> "JSONLLogger":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read a metrics.jsonl's rows but a truncated last one; CheckpointError if another is no object with a `step`."""
    return read_json_lines(user_path(path), key="step")


def truncate_metrics(path: str | Path, step: int) -> None:
    """Keep a metrics.jsonl's lines up to and including `step`, without a truncated last one. Atomic."""
    atomic_write_text(path, "".join(to_json(row) + "\n" for row in read_metrics(path) if row["step"] <= step))
