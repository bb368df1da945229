"""A command line's exit code, in the test's process."""

import pytest

from kdtune._cli.main import main


def run_command(argv: list[str]) -> int:
    """`kdtune ARGV...` in this process; what it prints is left to capsys."""
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert isinstance(ended.value.code, int)
    return ended.value.code
