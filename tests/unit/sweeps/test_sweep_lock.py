"""Two sweeps in one folder, and the step that a killed sweep leaves running."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from kdtune.errors import ConfigError
from kdtune.sweeps import locked

# Takes the lock with a given owner written into it, and holds it for a while.
HOLDER = """
import fcntl, sys, time
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX)
file.truncate(0); file.write(sys.argv[2]); file.flush()
print("held", flush=True)
time.sleep(float(sys.argv[3]))
"""


def hold(folder: Path, owner: int, seconds: float) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder / "lock"), str(owner), str(seconds)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_folder_in_use_is_refused_at_once(tmp_path: Path) -> None:
    holder = hold(tmp_path, owner=1, seconds=60)
    with pytest.raises(ConfigError, match="the sweep of process 1 is running there"), locked(tmp_path):
        pass
    holder.kill()
    holder.wait()


def test_the_step_of_a_killed_sweep_is_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    holder = hold(tmp_path, owner=dead_process(), seconds=0.7)
    started = time.monotonic()
    with locked(tmp_path):
        assert holder.wait(timeout=5) == 0 and time.monotonic() - started > 0.4
    assert "waiting for the step that a killed sweep" in capsys.readouterr().err


def test_the_lock_is_free_afterwards(tmp_path: Path) -> None:
    entered = 0
    for _ in range(2):  # a lock that was kept would refuse the second
        with locked(tmp_path / "new"):
            entered += 1
    assert entered == 2
