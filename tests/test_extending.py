"""docs/extending.md: each file and each command, as they stand there, run outside the package."""

import json
import os
import re
import shlex
from pathlib import Path

import pytest

from kdtune._cli.main import main

DOCS = Path(__file__).parent.parent / "docs/extending.md"


def files_and_commands() -> dict[str, list[str]]:
    """The commands below each file, by the heading that both stand under."""
    text = DOCS.read_text()
    sections = re.split(r"^## ", text, flags=re.M)[1:]
    return {
        section.partition("\n")[0]: re.findall(r"^    (kdtune .*)$", section.replace("\\\n", " "), flags=re.M)
        for section in sections
    }


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, code in re.findall(r"```python\n# (\S+)\n(.*?)```", DOCS.read_text(), flags=re.S):
        (tmp_path / name).write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("heading", files_and_commands())
def test_the_file_of_a_section_is_run(heading: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in files_and_commands()[heading]:
        arguments = shlex.split(command)[1:]
        if arguments[0] == "run":
            arguments.append(f"output_dir={folder / 'out'}")
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        printed = capsys.readouterr()
        assert ended.value.code == 0, printed.err
        if arguments[0] != "run":
            continue
        trained = [row for row in rows(folder / "out") if "loss" in row]
        assert len(trained) == 10 and trained[-1]["class_loss"] < trained[0]["class_loss"]
        assert (folder / "out/final/model.safetensors").is_file()
        if heading == "A divergence":
            assert "skew KL (0.2) to teacher" in printed.out
        if heading == "A teacher":
            assert all(0 < row["kd_loss"] < 20 for row in trained)
        if heading == "A recipe":
            assert trained[0]["loss"] > 1.9 * trained[0]["class_loss"]  # nearly every token is hard at first


def test_every_section_is_a_file_with_its_command(folder: Path) -> None:
    assert len(list(folder.glob("my_*.py"))) == len(files_and_commands()) == 4
    assert all(files_and_commands().values())
    assert os.environ.get("RANK") is None


def test_a_finished_run_of_ones_own_recipe_is_left_as_it_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (command,) = files_and_commands()["A recipe"]
    run = [*shlex.split(command)[1:], f"output_dir={folder / 'out'}", "save_every_n_steps=null"]
    found = []
    for again in ([], ["resume_from_checkpoint=true"]):
        with pytest.raises(SystemExit) as ended:
            main([*run, *again])
        assert ended.value.code == 0, capsys.readouterr().err
        found.append({path.name: path.read_bytes() for path in (folder / "out").rglob("*") if path.is_file()})
    assert "all 10 steps are done" in capsys.readouterr().out
    for files in found:  # drawn again
        files.pop("loss.png")
    assert found[0] == found[1]
