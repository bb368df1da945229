"""Turn SIGTERM, SIGHUP, SIGUSR1 and Ctrl-C into a flag, so that a run stops between two steps and saves first."""

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

# A terminal that closes sends SIGHUP; SIGUSR1 is what Slurm is often told to send before the time limit.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class InterruptFlag:
    """A context in which these signals only set `requested`; a second Ctrl-C raises KeyboardInterrupt at once.

    A SIGHUP that is ignored, as under nohup, stays ignored. The previous handlers are restored at the end. Like every signal
    handler, it must be entered in the main thread.

    Args:
        tell: called with a line for the user when the first signal comes; None: no message.
    """

    def __init__(self, tell: Callable[[str], None] | None = None) -> None:
        self._tell = tell
        self._received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Return whether the run should stop at the end of the current step."""
        return self._received is not None

    @property
    def signal_name(self) -> str | None:
        """Name of the first signal, such as "SIGTERM"; None without one."""
        return None if self._received is None else self._received.name

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self._received is not None:
            return
        self._received = signal.Signals(number)
        if self._tell is not None:
            again = "; Ctrl-C again ends it at once" if number == signal.SIGINT else ""
            text = f"{self._received.name}: the run will save after this step and end{again}"
            # The main thread may be in the middle of writing to the same stream, which cannot be entered twice.
            threading.Thread(target=self._tell, args=(text,), daemon=True).start()

    def __enter__(self) -> "InterruptFlag":
        kept = [number for number in _SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._handle) for number in kept}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
