"""`~` in configs and overrides: the home folder in every key and argument that is a path, and text anywhere else."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from config_samples import at_path

from kdtune.config import ConfigError, PathText, as_values, component, instantiate, load


def at_text_or_path(folder: str | Path, note: str = "", extra: list[PathText] | None = None) -> Any:
    return folder, note, extra


@dataclass
class Frame:
    output_dir: PathText
    models_dir: PathText = "~/models"
    steps_dir: PathText | None = None
    files: list[PathText] = field(default_factory=list)
    resume: Path | None = None
    prompt: str = ""
    log: str = "${output_dir}/log"
    reader: Any = component(default=None)
    other: Any = component(default=None)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return str(tmp_path / "home")


def filled(folder: Path, text: str, *overrides: str) -> dict[str, Any]:
    (folder / "a.yaml").write_text(text)
    return as_values(load(folder / "a.yaml", list(overrides), Frame))


def test_every_path_is_expanded_and_no_text(tmp_path: Path, home: str) -> None:
    values = filled(
        tmp_path,
        """
        output_dir: ~/runs/a
        steps_dir: ~/steps
        files: [~/b, c/~/d]
        resume: ~/e
        prompt: ~/what is this
        reader: {_component_: test_config_paths.at_text_or_path, folder: "${models_dir}/x", note: ~/text, extra: [~/f]}
        other: {_component_: config_samples.at_path, path: ~/g}
        """,
    )
    assert values["output_dir"] == f"{home}/runs/a"
    # What refers to a path has it expanded too, even where it is text.
    assert values["log"] == f"{home}/runs/a/log"
    assert values["models_dir"] == f"{home}/models"
    assert values["steps_dir"] == f"{home}/steps"
    assert values["files"] == [f"{home}/b", "c/~/d"]
    assert values["resume"] == Path(home) / "e"
    assert values["prompt"] == "~/what is this"
    assert instantiate(values["reader"]) == (f"{home}/models/x", "~/text", [f"{home}/f"])
    assert instantiate(values["other"]) == at_path(Path(home) / "g")


def test_overrides_are_expanded_alike(tmp_path: Path, home: str) -> None:
    values = filled(
        tmp_path, "output_dir: a\n", "output_dir=~", "steps_dir=~/s", "reader=test_config_paths.at_text_or_path",
        "reader.folder=~/r", "files=[~/z]",
    )  # fmt: skip
    assert values["output_dir"] == home
    assert values["steps_dir"] == f"{home}/s"
    assert instantiate(values["reader"])[0] == f"{home}/r"
    assert values["files"] == [f"{home}/z"]


def test_a_home_that_does_not_exist_is_a_finding(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        filled(tmp_path, "output_dir: ~no-such-user/x\n")
    assert str(error.value).splitlines()[1:] == [
        "  output_dir: ~no-such-user/x: no home folder of '~no-such-user'; give the full path of a file of that name"
    ]
