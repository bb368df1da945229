"""JSON lines files of a run: metrics.jsonl and samples.jsonl."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from kdtune.errors import CheckpointError
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
            self._file.write(_line({"step": step, **values}))
            self._file.flush()

    def close(self) -> None:
        """Close the file; everything logged is already in it."""
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> "JSONLLogger":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Read the rows of a metrics.jsonl, ignoring a truncated last line (of a killed writer).

    Raises:
        CheckpointError: any other line is not a JSON object with a `step`.
    """
    rows = []
    lines = user_path(path).read_text(encoding="utf-8-sig", errors="replace").split("\n")
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is torn or empty
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise CheckpointError(
                f"{path}: line {number} must be a JSON object with a step, is {line[:60]!r}; remove it"
            )
        rows.append(row)
    return rows


def truncate_metrics(path: str | Path, step: int) -> None:
    """Keep a metrics.jsonl's lines up to and including `step`, without a truncated last one. Atomic."""
    path = user_path(path)
    kept = [_line(row) for row in read_metrics(path) if row["step"] <= step]
    draft = path.with_name(path.name + ".tmp")
    with draft.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def _line(row: Mapping[str, Any]) -> str:
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()
    }
    return json.dumps(finite, ensure_ascii=False, allow_nan=False) + "\n"
