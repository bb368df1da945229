"""`kdtune ls KIND` and `kdtune ls a.dotted.component`."""

import pytest
from exit_codes import run_command

import kdtune.data
import kdtune.models
from kdtune._cli import components, ls
from kdtune.config import resolve


def shown(capsys: pytest.CaptureFixture[str], name: str) -> str:
    assert run_command(["ls", name]) == 0
    return capsys.readouterr().out


def test_the_kinds_are_those_that_ls_knows() -> None:
    assert components.KINDS == ls._KINDS


@pytest.mark.parametrize("kind", components.KINDS)
def test_what_a_kind_lists_exists_and_has_docs(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = shown(capsys, kind).partition("\n\n")[0].splitlines()
    assert rows
    for row in rows:
        name, _, docs = row.partition(" ")
        assert callable(resolve(name)) and docs.strip()


def test_every_dataset_and_builder_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    datasets = {
        row.split()[0].rpartition(".")[2] for row in shown(capsys, "datasets").partition("\n\n")[0].splitlines()
    }
    builders = {name for name in kdtune.data.__all__ if name.endswith("_dataset")}
    assert datasets == builders - {"load_dataset"}, "load_dataset makes what a config names"
    models = {row.split()[0].rpartition(".")[2] for row in shown(capsys, "models").partition("\n\n")[0].splitlines()}
    sizes = ["llama", *(name for family in kdtune.models.FAMILIES for name in family.sizes)]
    assert models == {prefix + name for prefix in ("", "lora_", "qlora_") for name in sizes}


def test_a_component_shows_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, "kdtune.data.instruct_dataset")
    assert out.startswith("kdtune.data.instruct_dataset: A dataset of questions and answers")
    lines = out.splitlines()
    assert "  tokenizer  (the recipe gives it)" in lines
    assert "* source: str" in lines
    assert "  data_dir: str or null = null" in lines
    assert "  split: str  (may be left out)" in lines
    parallelism = shown(capsys, "kdtune.distributed.Parallelism")
    assert "  cpu_offload: true or false = false" in parallelism.splitlines()
    assert "cpu_offload: shards, gradients and optimizer state lie in the CPU's memory" in parallelism
    assert "Initialize self" not in parallelism


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("kdtune.data.instruct_datase", "kdtune.data has no 'instruct_datase'; did you mean 'instruct_dataset'?"),
        ("kdtune.data", "kdtune.data is not a class or function that a config can name"),
        ("no_such_package.x", "no module named 'no_such_package'"),
    ],
)
def test_what_there_is_not_is_told(name: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["ls", name]) == 2
    assert words in capsys.readouterr().err
