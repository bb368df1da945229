"""Terminal output: one logger for the whole package, escaping of outside text, and streams that survive their reader."""

import errno
import io
import logging
import os
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO, TextIO, cast

from kdtune.escape import printable

# In a log file: seconds from line to line, and what one says.
_LINE_SECONDS = 15.0
_LINE = "{desc}: {n_fmt} of {total_fmt}, {elapsed} so far, {remaining} left"


def fit_for_stdout(text: str) -> str:
    """Escape a model's or a file's text if standard output is a terminal, which would act on control sequences."""
    return printable(text) if sys.stdout.isatty() else text


def terminal_width(stream: TextIO | None = None) -> int | None:
    """Return the width in columns for text on a stream (None: standard output): COLUMNS if it is set, else the terminal's.

    None (unlimited) if the stream is no terminal, or one without a size.
    """
    stream = stream or sys.stdout
    if (given := os.environ.get("COLUMNS", "")).isdecimal() and int(given) > 0:
        return int(given)
    if stream is None or not stream.isatty():
        return None
    with suppress(OSError, ValueError):  # not all terminals of containers know
        return os.get_terminal_size(stream.fileno()).columns or None
    return None


def fitted(text: str, stream: TextIO) -> str:
    """Wrap progress lines to the terminal's width by `wrap`; in a log file they are unchanged."""
    return wrap(text, terminal_width(stream), hang=2) if stream.isatty() else text


def wrap(text: str, width: int | None, *, hang: int = 0) -> str:
    """Wrap each line of a text to a width (None: unchanged), at blanks only: names, paths and commands without one stay unbroken.

    Continuation lines are indented like the line itself, plus `hang`.
    """
    if width is None:
        return text
    lines: list[str] = []
    for line in text.split("\n"):
        indent = line[: len(line) - len(line.lstrip())]
        lines += textwrap.wrap(
            line.strip(), max(width, 1), initial_indent=indent, subsequent_indent=indent + " " * hang,
            break_long_words=False, break_on_hyphens=False,
        ) or [""]  # fmt: skip
    return "\n".join(lines)


def bar_settings() -> dict[str, Any]:
    """Return settings for a tqdm bar on standard error; in a log file it prints occasional lines, without carriage returns."""
    if sys.stderr is None or sys.stderr.isatty():
        return {}
    return {"file": _Lines(sys.stderr), "mininterval": _LINE_SECONDS, "miniters": 1, "bar_format": _LINE}


class _Lines:
    """A stream that turns each redraw of a bar into a line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._last = ""

    def write(self, text: str) -> None:
        line = text.strip()
        if line and line != self._last:
            self._stream.write(line + "\n")
            self._last = line

    def flush(self) -> None:
        self._stream.flush()


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return fitted(printable(super().format(record)), sys.stderr)


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Write to the current sys.stderr, not to the one at import."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        """Standard error."""
        return sys.stderr


def get_logger(name: str = "kdtune") -> logging.Logger:
    """Return the package's logger or a child of it; messages go to stderr as plain lines."""
    root = logging.getLogger("kdtune")
    if not root.handlers:
        handler = _StderrHandler()
        handler.setFormatter(_Formatter("%(message)s"))
        root.addHandler(handler)
        root.setLevel(logging.INFO)
        root.propagate = False
    return logging.getLogger(name)


def outlive_readers() -> None:
    """Let this process go on when the reader of its stdout or stderr ends (`| head -1`, a closed pager or terminal).

    Output to such a stream is then discarded. Standard streams that were closed from the start (`>&-`, `2>&-`) discard their
    output too: otherwise the next file opened would get their descriptor, and prints would be written into it. Streams that
    Python code has replaced are unchanged. Both streams are line buffered, so that their lines keep their order in a log file,
    and they escape characters that their encoding lacks.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, _outliving(number, "utf-8", write_through=False))
        elif isinstance(stream, io.TextIOWrapper) and _descriptor(stream) == number:
            stream.flush()
            setattr(sys, name, _outliving(number, stream.encoding, write_through=stream.write_through))


class _OutlivingFile(io.FileIO):
    """Standard output or error; once nobody reads it, it becomes the null device, for this process and its children."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._was_terminal = self.isatty()  # one that has been closed no longer says so

    def write(self, data: Any, /) -> int:
        """Write all of the data, as a buffered file would, so that nothing is left to fail again when the process ends."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        while len(rest):
            try:
                rest = rest[super().write(rest) or 0 :]
            except OSError as error:
                # What a terminal that was closed answers is, of a file, a broken disk.
                is_gone = isinstance(error, BrokenPipeError | ConnectionResetError)
                if not is_gone and not (self._was_terminal and error.errno == errno.EIO):
                    raise
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.fileno())
                os.close(nowhere)
        return size


def _outliving(descriptor: int, encoding: str, *, write_through: bool) -> io.TextIOWrapper:
    raw = _OutlivingFile(descriptor)
    return io.TextIOWrapper(
        cast("BinaryIO", raw), encoding, "backslashreplace", line_buffering=True, write_through=write_through
    )


def _descriptor(stream: TextIO) -> int | None:
    with suppress(OSError, ValueError):  # a stream in memory has none
        return stream.fileno()
    return None


@contextmanager
def told_once() -> Iterator[None]:
    """Show a repeated message only once, as when many similar configs are checked."""
    get_logger()
    (handler, *_) = logging.getLogger("kdtune").handlers
    seen: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        known = message in seen
        seen.add(message)
        return not known

    handler.addFilter(is_new)
    try:
        yield
    finally:
        handler.removeFilter(is_new)
