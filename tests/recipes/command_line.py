"""The command line as a function, in this process and in one of its own."""

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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
