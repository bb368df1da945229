"""Read text, JSON and JSON lines files, and format values as JSON."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kdtune.errors import CheckpointError


def read_text(file: Path, *, advice: str = "download it again") -> str:
    """Return the content of a UTF-8 file without a byte order mark.

    Raises:
        CheckpointError: the file cannot be read, or is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}; {advice}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file}: is not UTF-8 text: {error}; it may be damaged: {advice}") from error


def read_json(file: Path, *, advice: str = "download it again") -> dict[str, Any]:
    """Return the object in a JSON file.

    Args:
        file: its path.
        advice: what the user can do about a damaged file.

    Raises:
        CheckpointError: the file is missing, is not JSON, is nested too deeply, or holds something other than an object.
    """
    try:
        found = json.loads(read_text(file, advice=advice))
    except ValueError as error:
        raise CheckpointError(f"{file}: is not JSON: {error}; it may be cut off: {advice}") from error
    except RecursionError as error:
        raise CheckpointError(f"{file}: is nested too deeply to be read: {advice}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: holds a {type(found).__name__}, an object expected; {advice}")
    return found


def read_json_if_there(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file, or an empty one if there is no such file."""
    return read_json(file) if file.is_file() else {}


def read_json_lines(file: Path, *, key: str | None = None) -> list[dict[str, Any]]:
    """Return the objects in a JSON lines file, ignoring a truncated last line (of a killed writer).

    Raises:
        CheckpointError: the file cannot be read, or any other line is not a JSON object, with `key` in it as an integer.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig", errors="replace").split("\n")
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from error
    rows = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is torn or empty
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or (key is not None and not isinstance(row.get(key), int)):
            what = "a JSON object" if key is None else f"a JSON object with a {key}"
            raise CheckpointError(f"{file}: line {number} must be {what}, is {line[:60]!r}; remove it")
        rows.append(row)
    return rows


def to_json(value: Any, *, indent: int | None = None, default: Callable[[Any], Any] | None = None) -> str:
    """Format a value as JSON, with null for non-finite numbers. `default` converts objects that JSON lacks, such as `str`."""
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, indent=indent, default=default)


def _finite(value: Any) -> Any:
    """Replace infinite and undefined numbers in the value by None, at any depth."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
