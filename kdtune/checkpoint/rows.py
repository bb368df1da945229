"""Write JSONL files whose rows arrive one by one, in any order."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kdtune.checkpoint.atomic import atomic_write_text, writing
from kdtune.errors import CheckpointError
from kdtune.log import get_logger
from kdtune.paths import user_path

_log = get_logger(__name__)


def partial_of(path: str | Path) -> Path:
    """Return the path that holds partial results until `path` is complete: `path`.partial."""
    return user_path(path).with_name(user_path(path).name + ".partial")


@contextmanager
def collected_rows(path: str | Path) -> Iterator[Callable[[int, Mapping[str, Any]], None]]:
    """Yield a function that takes a row and its number; when the block ends without an error, `path` has the rows in order.

    Until then each row is in `partial_of(path)` with its number, written as soon as it arrives, so a stopped or killed
    process keeps its rows there. An existing `path` is replaced atomically when all rows are there.

    Raises:
        CheckpointError: the disk is full or cannot be written.
    """
    partial = partial_of(path)
    rows: dict[int, str] = {}
    with writing(partial):
        partial.parent.mkdir(parents=True, exist_ok=True)
        file = partial.open("w", encoding="utf-8", errors="backslashreplace")

    def add(number: int, row: Mapping[str, Any]) -> None:
        rows[number] = _line(row)
        with writing(partial):
            file.write(_line({"number": number, **row}))
            file.flush()

    try:
        with file:
            yield add
        atomic_write_text(path, "".join(rows[number] for number in sorted(rows)))
    except BaseException as error:
        if not rows:
            with suppress(OSError):
                partial.unlink()
        elif not isinstance(error, CheckpointError):
            _log.warning("%s: keeps the %d rows that were there by then", partial, len(rows))
        raise
    partial.unlink()


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
