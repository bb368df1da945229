"""Read text and JSON files of a model or tokenizer folder."""

import json
from pathlib import Path
from typing import Any

from kdtune.errors import CheckpointError


def read_text(file: Path) -> str:
    """Return the content of a UTF-8 file without a byte order mark.

    Raises:
        CheckpointError: the file cannot be read, or is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}; download it again") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file}: is not UTF-8 text: {error}; it may be damaged: download it again") from error


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        CheckpointError: the file is missing, is not JSON, is nested too deeply, or holds something other than an object.
    """
    try:
        found = json.loads(read_text(file))
    except ValueError as error:
        raise CheckpointError(f"{file}: is not JSON: {error}; it may be cut off: download it again") from error
    except RecursionError as error:
        raise CheckpointError(
            f"{file}: is nested too deeply to be read; it is no model's file: download it again"
        ) from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: holds a {type(found).__name__}, an object expected; download it again")
    return found


def read_json_if_there(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file, or an empty one if there is no such file."""
    return read_json(file) if file.is_file() else {}
