"""Progress of a sweep on stderr: a bar in a terminal, lines elsewhere, with the latest output of the running step."""

import os
import sys
import time
from pathlib import Path

from tqdm import tqdm

from kdtune.escape import one_line
from kdtune.log import fitted
from kdtune.sweeps.plan import Cell, Step

_BAR = "{n_fmt}/{total_fmt} cells {elapsed}{postfix}"
_REFRESH_SECONDS = 1.0
_TAIL_BYTES = 4096


class SweepProgress:
    """Show the cells of a sweep and the step that runs.

    Each step begins with a line. In a terminal a bar below it shows the last line of the step's log. Elsewhere (a log file,
    a pipe) that line is printed whenever `patience` seconds have passed without one.
    """

    def __init__(self, num_cells: int, *, patience: float = 15.0) -> None:
        self._patience = patience
        self._bar = tqdm(total=num_cells, bar_format=_BAR, disable=not sys.stderr.isatty(), dynamic_ncols=True)
        self._num_cells = num_cells
        self._began = self._last_line = self._refreshed = time.monotonic()
        self._step: Step | None = None

    def begin(self, number: int, cell: Cell, step: Step) -> None:
        """Report that a step of a cell (counted from 1) begins."""
        self._step, self._began = step, time.monotonic()
        self._bar.set_postfix_str("", refresh=False)
        self.write(f"cell {number}/{self._num_cells} {cell.name}: {step.id} ({step.log})")

    def running(self) -> None:
        """Update the display; call it often while a step runs."""
        now = time.monotonic()
        if self._step is None or now - self._refreshed < _REFRESH_SECONDS:
            return
        self._refreshed = now
        if not self._bar.disable:
            self._bar.set_postfix_str(last_line(self._step.log))
        elif now - self._last_line >= self._patience:
            seconds = tqdm.format_interval(now - self._began)
            self.write(f"  {self._step.name}, {seconds} so far: {last_line(self._step.log) or 'starting'}")

    def write(self, text: str) -> None:
        """Print a line without breaking the bar."""
        tqdm.write(fitted(text, sys.stderr), file=sys.stderr)
        sys.stderr.flush()
        self._last_line = time.monotonic()

    def cell_done(self) -> None:
        """Count a cell, finished or failed."""
        self._bar.set_postfix_str("", refresh=False)
        self._bar.update()

    def __enter__(self) -> "SweepProgress":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()


def last_line(log_file: Path) -> str:
    """Return the last line of a step's log, for a progress bar its last state; "" before any output."""
    try:
        with log_file.open("rb") as file:
            file.seek(-min(_TAIL_BYTES, file.seek(0, os.SEEK_END)), os.SEEK_END)
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    lines = [one_line(line.rstrip("\r").rpartition("\r")[2]) for line in text.split("\n")]
    shown = [line for line in lines if line]
    return shown[-1] if shown and not shown[-1].startswith("$ kdtune ") else ""
