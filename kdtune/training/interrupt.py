"""SIGTERM and Ctrl-C as a flag, so that a run stops between two steps and saves first."""

import signal
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class InterruptFlag:
    """Context in which SIGTERM and Ctrl-C only set `requested`; a second Ctrl-C raises KeyboardInterrupt at once.

    The handlers from before come back at the end. Like every signal handler it must be entered in the main thread.
    """

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether the run should stop at the next step's edge."""
        return self._received is not None

    @property
    def signal_name(self) -> str | None:
        """The signal that came first, "SIGINT" or "SIGTERM"; None if neither did."""
        return None if self._received is None else self._received.name

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = self._received or signal.Signals(number)

    def __enter__(self) -> "InterruptFlag":
        self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
