"""A run whose terminal is closed, as by a lost connection, saves and ends as any other that is told to stop."""

import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from command_line import ROOT


@pytest.mark.slow("imports torch anew; test_cli_streams.py closes a terminal too")
def test_a_closed_terminal_saves_the_run(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()

    def take_the_terminal() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests' own process may ignore it, as under nohup
        os.setsid()
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    out = tmp_path / "out"
    process = subprocess.Popen(
        [
            sys.executable, "-m", "kdtune", "run", "finetune", "--config", "tiny/finetune", f"output_dir={out}",
            "max_steps_per_epoch=null", "epochs=1000", "sample_prompts=[]", "run_val_every_n_steps=null", "save_every_n_steps=null",
        ],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdin=theirs, stdout=theirs, stderr=theirs,
        preexec_fn=take_the_terminal,
    )  # fmt: skip
    os.close(theirs)
    seen = b""
    while b"step 1/" not in seen:
        seen += os.read(ours, 4096)
    os.close(ours)  # the kernel sends SIGHUP, and what is written from now on fails with EIO
    assert process.wait(60) == 0
    (saved,) = out.glob("step_*")
    assert json.loads((saved / "state" / "state.json").read_text())
    assert not (out / "final").exists()
