"""The command line as a function: in this process, in a fork of it, and in a process of its own."""

import contextlib
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import pytest

from kdtune._cli.main import main

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Outcome:
    """How a command line ended, and what it printed."""

    code: int
    out: str
    err: str


CLI = Callable[..., Outcome]


def run_here(*argv: str) -> Outcome:
    """`kdtune ARGV...` in this process; an exception that would have been a traceback comes out as it is."""
    out, err = io.StringIO(), io.StringIO()
    path = list(sys.path)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stopped:
        main(list(argv))
    sys.path[:] = path
    assert isinstance(stopped.value.code, int)
    return Outcome(stopped.value.code, out.getvalue(), err.getvalue())


def run_there(*argv: str, prepare: Callable[[], None] | None = None) -> Outcome:
    """`python -m kdtune ARGV...` as a process of its own; `prepare` runs in it before Python starts."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "kdtune", *argv],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, preexec_fn=prepare,
    )  # fmt: skip
    return Outcome(done.returncode, done.stdout, done.stderr)


class Fork:
    """`kdtune ARGV...` in a fork of this process, to be killed or told to stop: a process without the seconds of its imports."""

    def __init__(self, *argv: str) -> None:
        self._streams = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")  # noqa: SIM115  open until both processes have ended
        self._process = multiprocessing.get_context("fork").Process(target=_run_forked, args=(argv, *self._streams))
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process.is_alive()

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def end(self, timeout: float = 120) -> Outcome:
        """Wait for its end, which must come in time; a signal's code is negative."""
        self._process.join(timeout)
        late = self.is_running
        self._process.kill()
        out, err = (_text_of(stream) for stream in self._streams)
        assert not late and self._process.exitcode is not None, out + err
        return Outcome(self._process.exitcode, out, err)


def _run_forked(argv: tuple[str, ...], out: TextIO, err: TextIO) -> None:
    os.setsid()
    sys.stdout, sys.stderr = out, err
    main(list(argv))


def _text_of(stream: TextIO) -> str:
    stream.seek(0)
    return stream.read()
