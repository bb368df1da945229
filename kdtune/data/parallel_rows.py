"""Tokenize the rows of a source in several processes, in order."""

import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice

from kdtune.data.columns import Row
from kdtune.data.dataset import DatasetStats, total_report
from kdtune.data.transforms import EncodedRow
from kdtune.errors import DataError, KDTuneError

Encode = Callable[[Iterable[Row], DatasetStats], Iterator[EncodedRow]]
_Answer = tuple[Sequence[Row], tuple[list[EncodedRow], DatasetStats] | None]

FEWEST_ROWS = 4_000
"""Fewer rows are tokenized by the process itself: starting others would take as long."""
_ROWS_AT_ONCE = 500
_MOST_PROCESSES = 16

# In a child process, what its parent encodes rows with: forked, not pickled.
_encode: Encode | None = None


def num_processes(rows: Iterable[Row]) -> int:
    """Return the number of processes for these rows: this process's share of the host's processors; 1 for a few rows."""
    if not sys.platform.startswith("linux") or not _are_many(rows):
        return 1
    on_host = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(_MOST_PROCESSES, len(os.sched_getaffinity(0)) // on_host))


def _are_many(rows: Iterable[Row]) -> bool:
    if isinstance(rows, Sized):
        return len(rows) >= FEWEST_ROWS
    try:
        return iter(rows) is not rows and sum(1 for _ in islice(rows, FEWEST_ROWS)) == FEWEST_ROWS
    except DataError:  # which is told in its turn
        return False


def encoded_in_parallel(
    rows: Iterable[Row], encode: Encode, report: DatasetStats, processes: int
) -> Iterator[EncodedRow]:
    """Yield what `encode(rows, report)` yields, from `processes` processes, in the same order and with the same report.

    Raises:
        DataError: a row cannot be used; the same one as without processes.
    """
    global _encode
    _encode = encode
    try:
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(processes, context, _leave_ctrl_c_to_the_parent) as pool:
            for part, found in _in_order(pool, _parts(rows), 2 * processes):
                if found is None:  # the parent raises the error, with the row's number
                    yield from encode(part, report)
                    continue
                encoded, counts = found
                total = total_report([report, counts], report.source)
                vars(report).update(vars(total))
                yield from encoded
    except BrokenProcessPool as error:
        raise DataError(
            f"{report.source}: a process that tokenizes rows has ended, perhaps for lack of memory; fewer processors "
            "(taskset -c 0) start fewer processes"
        ) from error
    finally:
        _encode = None


def _in_order(pool: ProcessPoolExecutor, parts: Iterator[list[Row]], num_ahead: int) -> Iterator[_Answer]:
    """Yield what `_encoded` returns for each part, of which at most so many are computed ahead."""
    ahead = deque(pool.submit(_encoded, part) for part in islice(parts, num_ahead))
    while ahead:
        yield ahead.popleft().result()
        ahead.extend(pool.submit(_encoded, part) for part in islice(parts, 1))


def _encoded(part: Sequence[Row]) -> _Answer:
    assert _encode is not None
    report = DatasetStats("")
    try:
        return [], (list(_encode(part, report)), report)
    except KDTuneError:
        return part, None


def _parts(rows: Iterable[Row]) -> Iterator[list[Row]]:
    rows = iter(rows)
    while part := list(islice(rows, _ROWS_AT_ONCE)):
        yield part


def _leave_ctrl_c_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
