"""A command whose output nobody reads goes on to its end, and ends as it would have."""

import fcntl
import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
# Says something, then works: what a run does, without torch.
WORK = """
import subprocess, sys
from pathlib import Path
from kdtune.log import get_logger, outlive_readers

outlive_readers()
for number in range(3_000):
    print("line", number)
    print("message", number, file=sys.stderr)
    get_logger().info("logged")
subprocess.run([sys.executable, "-c", "print('from a child')"], check=True)
with Path("result").open("w") as result:
    print("still printing", flush=True)
    print("still telling", file=sys.stderr)
    result.write("done")
"""


def shell(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A command of bash, whose exit code is that of the first process of a pipe; PYTHON and WORK are set."""
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "PYTHON": sys.executable, "WORK": WORK}
    return subprocess.run(
        ["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize(
    "redirection",
    [
        "2>/dev/null | head -1",
        "2>&1 | head -1",
        "2>&1 >/dev/null | head -1",
        "2>&1 | true",
        ">&-",
        "2>&-",
        ">&- 2>&-",
        "<&- >&- 2>&-",
    ],
)
@pytest.mark.parametrize("options", ["", "-u"])
def test_work_is_done_whoever_reads(redirection: str, options: str, tmp_path: Path) -> None:
    done = shell(f'"$PYTHON" {options} -c "$WORK" {redirection}', tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "Broken pipe" not in done.stderr
    # What is printed to a closed stream does not end up in the file that would have taken its descriptor.
    assert (tmp_path / "result").read_text() == "done"


def test_a_reader_that_stays_gets_every_line(tmp_path: Path) -> None:
    done = shell('"$PYTHON" -c "$WORK" 2>/dev/null', tmp_path)
    assert done.stdout == "".join(f"line {number}\n" for number in range(3_000)) + "from a child\nstill printing\n"


def test_lines_stand_in_a_log_file_in_the_order_in_which_they_came(tmp_path: Path) -> None:
    assert shell('"$PYTHON" -c "$WORK" > log 2>&1', tmp_path).returncode == 0
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines[:60] == [line for number in range(20) for line in (f"line {number}", f"message {number}", "logged")]


def test_listing_into_head_is_quiet(tmp_path: Path) -> None:
    done = shell('"$PYTHON" -m kdtune ls | head -1', tmp_path)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["RECIPE", "CONFIG"], "")


def test_a_failure_keeps_its_exit_code(tmp_path: Path) -> None:
    assert shell('"$PYTHON" -m kdtune ls nonsense 2>&-', tmp_path).returncode == 2
    assert shell('"$PYTHON" -m kdtune ls nonsense 2>&1 | true', tmp_path).returncode == 2


def test_output_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    done = shell('"$PYTHON" -m kdtune ls >/dev/full', tmp_path)
    assert done.returncode == 1
    assert done.stderr == "error: output: No space left on device\n"


def in_a_terminal(argv: list[str], folder: Path) -> tuple["subprocess.Popen[bytes]", int]:
    """A process whose controlling terminal is a new one, and the terminal's other end."""
    ours, theirs = pty.openpty()

    def take() -> None:
        os.setsid()
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        argv, cwd=folder, env=environment, stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=take
    )
    os.close(theirs)
    return process, ours


def close_when_told(terminal: int, word: bytes) -> None:
    """Closes the terminal, as a lost connection does, when the word has been printed there."""
    seen = b""
    while word not in seen:
        seen += os.read(terminal, 4096)
    os.close(terminal)


def test_work_is_done_in_a_terminal_that_was_closed(tmp_path: Path) -> None:
    """Reading a closed terminal's other end is EIO, as a broken disk is."""
    head, tail = WORK.split("for number", 1)
    wait = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\nprint('ready')\n"
    wait += "while Path('open').exists(): pass\n"
    (tmp_path / "open").touch()
    process, terminal = in_a_terminal([sys.executable, "-c", f"{head}{wait}for number{tail}"], tmp_path)
    close_when_told(terminal, b"ready")
    (tmp_path / "open").unlink()
    assert process.wait(60) == 0
    assert (tmp_path / "result").read_text() == "done"


def test_output_that_is_broken_is_told(tmp_path: Path) -> None:
    """EIO of what is no terminal: /proc/self/mem cannot be written at address 0."""
    code = "import os; from kdtune.log import outlive_readers; os.dup2(os.open('/proc/self/mem', os.O_RDWR), 1); outlive_readers()"
    done = shell(f'"$PYTHON" -c "{code}; print(1)"', tmp_path)
    assert done.returncode == 1 and "Input/output error" in done.stderr
