"""Progress of a run on stderr: a line for each phase, a bar in a terminal, lines elsewhere."""

import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import ExitStack
from typing import Any, TextIO, TypeVar

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from kdtune.log import fitted, get_logger

T = TypeVar("T")
# A narrow terminal cuts the line on the right: what matters most comes first.
_BAR = "{n_fmt}/{total_fmt} {bar:6} {elapsed}<{remaining}{postfix}"


class Progress:
    """Show the phases and steps of a run; a phase that takes long is shown again.

    In a terminal a bar shows the steps once `start` has said how many there are. Without one (a log file, a pipe, a terminal
    without a size) a line is printed every few steps, at the first and last, and whenever `patience` has passed.

    Args:
        silent: show nothing, as on all ranks but 0.
        stream: output stream; None: stderr.
        every: without a terminal, steps between lines.
        patience: seconds without a line after which the current phase is shown again, with its progress.
    """

    def __init__(
        self, *, silent: bool = False, stream: TextIO | None = None, every: int = 10, patience: float = 15.0
    ) -> None:
        self._stream = stream or sys.stderr
        self._silent = silent or self._stream is None
        self._every, self._patience = every, patience
        self._lock = threading.RLock()
        self._phase, self._count, self._numbers, self._unit = "starting", "", "", "step"
        self._first = self._step = self._total = 0
        self._started = self._began = self._last_line = time.monotonic()
        self._bar: tqdm[Any] | None = None
        self._over = threading.Event()
        self._resources = ExitStack()
        _all.add(self)

    def phase(self, text: str) -> None:
        """Begin a phase, such as "reading the data", with a line; it lasts until the next one or the next step."""
        with self._lock:
            if text != self._phase:
                self._print(text)
            self._begin(text)

    def counted(self, items: Iterable[T], unit: str, phase: str | None = None) -> Iterator[T]:
        """Yield the items and count them in the current phase, or in a new one."""
        if phase is not None:
            with self._lock:
                self._begin(phase)
        total = f" of {len(items)}" if isinstance(items, Sized) else ""
        for number, item in enumerate(items, start=1):
            self._count = f", {number}{total} {unit}"
            yield item
        self._count = ""

    def validating(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield the batches of a validation and count them."""
        if self._total == 0:
            self.phase("validating before the first step")
            return self.counted(batches, "batches")
        return self.counted(batches, "batches", f"validating after step {self._step + 1}")

    def micro_batches(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield the micro-batches of the next step and count them."""
        return self.counted(batches, "micro-batches", f"step {self._step + 1}/{self._total}")

    def counting(self, total: int, what: str) -> Callable[[int], None]:
        """Show "0 of `total` `what`" in the current phase or step, and return a function that adds to the number."""
        done = 0

        def add(number: int) -> None:
            nonlocal done
            done += number
            self._count = f", {done} of {total} {what}"

        add(0)
        return add

    def share(self, done: float) -> None:
        """Show the fraction of the current phase or step that is done, from 0 to 1."""
        self._count = f", {done:.0%}"

    def start(self, num_steps: int, step: int = 0, *, doing: str = "training", unit: str = "step") -> None:
        """Begin the steps, of training or of what `doing` says, with `step` of `num_steps` done; `unit` is what one is called."""
        self._first, self._step, self._total, self._unit = step, step, num_steps, unit
        if step < num_steps:  # else the run was killed after its last step, before final/ was whole
            self.phase(f"{doing}: {unit}s {step + 1:,} to {num_steps:,}")
        self._started = time.monotonic()
        if not self._silent and _has_size(self._stream):
            self._bar = tqdm(
                total=num_steps, initial=step, file=self._stream, dynamic_ncols=True, bar_format=_BAR, miniters=1
            )
            self._resources.enter_context(logging_redirect_tqdm([get_logger()]))

    def step(self, step: int, numbers: Sequence[str]) -> None:
        """Report that `step` steps are done; `numbers` are the last step's metrics, such as "loss 2.310"."""
        with self._lock:
            self._step, now = step, time.monotonic()
            self._numbers = ", ".join(numbers)
            self._begin(f"{self._unit} {step + 1}/{self._total}")
            if self._bar is not None:
                self._bar.set_postfix_str(self._numbers, refresh=False)
                self._bar.update(step - self._bar.n)
                return
            is_edge = step in (self._first + 1, self._total)
            if is_edge or step % self._every == 0 or now - self._last_line >= self._patience:
                seconds = (now - self._started) / (step - self._first) * (self._total - step)
                self._print("  ".join([f"{self._unit} {step}/{self._total}", *numbers, f"{_clock(seconds)} left"]))

    def end_steps(self) -> None:
        """End the steps: leave the bar as it is and print lines after it."""
        with self._lock:
            if self._bar is not None:
                self._bar.close()
                self._bar = None
            self._resources.close()

    def write(self, text: str) -> None:
        """Print a text without breaking the bar."""
        with self._lock:
            self._print(text)

    def close(self) -> None:
        """Stop all output."""
        self._over.set()
        self.end_steps()
        self._silent = True

    def _begin(self, phase: str) -> None:
        self._phase, self._count, self._began = phase, "", time.monotonic()

    def _print(self, text: str) -> None:
        if self._silent:
            return
        try:
            tqdm.write(fitted(text, self._stream), file=self._stream)
            self._stream.flush()
        except (OSError, ValueError):  # the reader has ended (`2>&1 | head`), which does not harm the run
            self._silent = True
        self._last_line = time.monotonic()

    def _watch(self) -> None:
        """Background thread: repeat the current phase when it takes long."""
        while not self._over.wait(min(1.0, self._patience / 4)):
            with self._lock:
                if not self._silent:
                    self._remind()

    def _remind(self) -> None:
        now = time.monotonic()
        lasted = now - self._began
        if self._bar is not None:
            is_step = self._is_step()
            if lasted > 2.0 and (self._count or not is_step):
                count = self._count.removeprefix(", ")
                # The right end may be cut off: the last step's numbers, which are known.
                what = [count, self._numbers] if is_step else [self._phase, count]
                self._bar.set_postfix_str(", ".join(filter(None, what)), refresh=False)
            self._bar.refresh()
        elif now - self._last_line >= self._patience:
            if self._numbers and self._is_step() and lasted < self._patience:
                # Steps are being made, but not enough for a line.
                self._print(f"{self._unit} {self._step}/{self._total}  {self._numbers}")
            else:
                self._print(f"{self._phase}{self._count}, {_clock(lasted)} so far")

    def _is_step(self) -> bool:
        return self._phase.startswith(f"{self._unit} ")

    def __enter__(self) -> "Progress":
        if not self._silent:
            threading.Thread(target=self._watch, name="kdtune-progress", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


_all: weakref.WeakSet[Progress] = weakref.WeakSet()
_held: list[Progress] = []
_forking = threading.Lock()


def _hold() -> None:
    """Wait until no thread is writing: a child forked meanwhile, such as a data worker, would find tqdm's lock held forever."""
    _forking.acquire()
    _held[:] = _all
    for progress in _held:
        progress._lock.acquire()


def _release() -> None:
    while _held:
        _held.pop()._lock.release()
    _forking.release()


os.register_at_fork(before=_hold, after_in_parent=_release, after_in_child=_release)


def _has_size(stream: TextIO) -> bool:
    """Return whether a bar can be drawn: a terminal with a size, which those of some containers lack."""
    try:
        columns, lines = os.get_terminal_size(stream.fileno()) if stream.isatty() else (0, 0)
    except (OSError, ValueError):
        return False
    return columns > 0 and lines > 0 and os.environ.get("TERM") != "dumb"


def _clock(seconds: float) -> str:
    return str(tqdm.format_interval(seconds))
