"""A Python program in a terminal of a given size."""

import os
import pty
import struct
import subprocess
import sys
import termios
from fcntl import ioctl
from pathlib import Path

ROOT = Path(__file__).parents[1]


def output_in_terminal(code: str, *, columns: int, lines: int = 24, **environment: str) -> list[str]:
    """The lines that `python -c code` writes to a terminal, carriage returns at their ends left out; it must end well."""
    leader, follower = pty.openpty()
    ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    known = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=follower, stderr=follower,
                               env={**known, "PYTHONPATH": str(ROOT), "TERM": "xterm", **environment})  # fmt: skip
    os.close(follower)
    text = b""
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:  # Linux: the other end is closed
            break
        if not part:
            break
        text += part
    os.close(leader)
    assert process.wait() == 0, text
    return [line.rstrip("\r") for line in text.decode().split("\n")]
