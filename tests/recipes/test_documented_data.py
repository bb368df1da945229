"""The files, commands and outputs of docs/data.md: each output is what its command prints."""

import re
import shlex
from itertools import dropwhile, takewhile
from pathlib import Path

import pytest
from exit_codes import run_command

PAGE = (Path(__file__).parents[2] / "docs/data.md").read_text()


def indented(text: str) -> str:
    """The first indented block of a text, without its indent."""
    lines = dropwhile(lambda line: not line.startswith("    "), text.split("\n"))
    block = takewhile(lambda line: not line or line.startswith("    "), lines)
    return "\n".join(line.removeprefix("    ") for line in block).rstrip("\n")


def outputs() -> list[tuple[str, str]]:
    """Each `kdtune data tiny/...` command of the page, with the block that follows it."""
    found = [
        (match[1], indented(PAGE[match.end() :])) for match in re.finditer(r"^ {4}kdtune (data tiny/.*)\n", PAGE, re.M)
    ]
    assert len(found) == 2
    return found


@pytest.mark.parametrize(("command", "output"), outputs())
def test_outputs_are_what_is_printed(
    command: str, output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "60")
    for match in re.finditer(r"`(\w+\.jsonl)`[^`]*?:\n", PAGE):
        (tmp_path / match[1]).write_text(indented(PAGE[match.end() :]))
    assert run_command(shlex.split(command)) == 0
    printed = capsys.readouterr().out.rstrip("\n")
    assert printed.endswith(output) and len(output) > 100
