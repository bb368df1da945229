"""The progress shown on stderr: a bar in a terminal, a line every few steps elsewhere."""

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import TextIO

from tqdm import tqdm

# What is shown, in this order, with short names; everything else goes to the loggers only.
_SHOWN = {"loss": "loss", "kd_loss": "kl", "class_loss": "ce", "lr": "lr", "tokens_per_second": "tok/s"}


class ProgressBar:
    """Shows step, loss, KL, cross entropy, learning rate and speed.

    Args:
        total: number of steps.
        initial: steps already done (a resumed run).
        every: without a terminal, a line is printed every so many steps and at the last.
        silent: show nothing, as on the processes that are not the main one.
        stream: where to; None: stderr.
    """

    def __init__(
        self, total: int, initial: int = 0, *, every: int = 10, silent: bool = False, stream: TextIO | None = None
    ) -> None:
        self._stream = stream or sys.stderr
        self._silent = silent
        self._total, self._step, self._initial, self._every = total, initial, initial, max(1, every)
        self._started = time.monotonic()
        self._bar = (
            tqdm(total=total, initial=initial, file=self._stream, unit="step", dynamic_ncols=True)
            if self._stream.isatty() and not silent
            else None
        )

    def update(self, values: Mapping[str, float]) -> None:
        """One more step is done, with these numbers."""
        self._step += 1
        if self._silent:
            return
        shown = {short: _format(name, values[name]) for name, short in _SHOWN.items() if name in values}
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update()
        elif self._step % self._every == 0 or self._step == self._total:
            numbers = "  ".join(f"{name} {value}" for name, value in shown.items())
            print(
                f"step {self._step}/{self._total}  {numbers}  {self._remaining()} left", file=self._stream, flush=True
            )

    def write(self, text: str) -> None:
        """Print a text without breaking the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()

    def _remaining(self) -> str:
        seconds = (time.monotonic() - self._started) / (self._step - self._initial) * (self._total - self._step)
        return tqdm.format_interval(seconds)

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _format(name: str, value: float) -> str:
    if name == "lr":
        return f"{value:.2e}"
    return f"{value:,.0f}" if name == "tokens_per_second" else f"{value:.3f}"
