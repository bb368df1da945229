"""What a run starts from: a resumed run has the same rows and weights, and no example is longer than a model's context."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from shutil import copytree

import pytest
from command_line import CLI, Outcome
from safetensors.torch import load_file, save_file

KD, FINETUNE = "knowledge_distillation", "finetune"
SHORT = ("sample_prompts=[]", "save_every_n_steps=1", "run_val_every_n_steps=null", "~lr_scheduler")
Run = Callable[..., Outcome]


def write_rows(file: Path, answer: str, count: int = 24) -> None:
    row = json.dumps({"instruction": "Say hi", "input": "", "output": answer})
    file.write_text((row + "\n") * count)


def scale(file: Path) -> None:
    """The same tensors, doubled: a file of the same size."""
    size = file.stat().st_size
    tensors = {name: 2 * tensor for name, tensor in load_file(file).items()}
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})
    assert file.stat().st_size == size


def checkpointer(key: str, folder: str) -> str:
    return f"{key}={{_component_: kdtune.checkpoint.Checkpointer, checkpoint_dir: {folder}}}"


def train(cli: CLI, steps: int, *overrides: str) -> Outcome:
    """So many steps on the models and rows of the working directory."""
    return cli(
        "run", KD, "--config", "tiny/knowledge_distillation", "output_dir=out", *SHORT, f"max_steps_per_epoch={steps}",
        "dataset=kdtune.data.alpaca_dataset", "dataset.source=rows.jsonl",
        "dataset_val=kdtune.data.alpaca_dataset", "dataset_val.source=held_out.jsonl",
        "~model", checkpointer("checkpointer", "student"),
        "~teacher_model", checkpointer("teacher_checkpointer", "teacher"), *overrides,
    )  # fmt: skip


@pytest.fixture(scope="module")
def started(cli: CLI, good: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models, rows and a run of one step."""
    folder = tmp_path_factory.mktemp("started")
    for name in ("student", "teacher"):
        copytree(good / "model", folder / name)
    write_rows(folder / "rows.jsonl", "hello")
    write_rows(folder / "held_out.jsonl", "hi", 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train(cli, 1).code == 0
    return folder


@pytest.fixture
def run(cli: CLI, started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`train` in a copy of `started`, the working directory."""
    copytree(started, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return partial(train, cli)


def test_the_same_inputs_go_on(run: Run, tmp_path: Path) -> None:
    done = run(2, "resume_from_checkpoint=true")
    assert done.code == 0, done.err
    first, second = (start["inputs"] for start in json.loads((tmp_path / "out" / "run.json").read_text())["starts"])
    assert first == second
    assert set(first) == {"tokenizer", "checkpointer", "teacher_checkpointer", "dataset", "dataset_val"}
    assert first["dataset"].startswith("24 examples, ")
    assert set(first["checkpointer"]) == {"config", "model.safetensors"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tmp: write_rows(tmp / "rows.jsonl", "howdy"), "dataset: was '24 examples, "),
        (lambda tmp: write_rows(tmp / "rows.jsonl", "hello", 25), "is '25 examples, "),
        (lambda tmp: scale(tmp / "teacher" / "model.safetensors"), "teacher_checkpointer.model.safetensors: was '"),
        (lambda tmp: scale(tmp / "student" / "model.safetensors"), "  checkpointer.model.safetensors: was '"),
    ],
    ids=["other rows", "more rows", "another teacher", "another student"],
)
def test_other_inputs_under_the_same_paths_are_refused(
    change: Callable[[Path], None], said: str, run: Run, tmp_path: Path
) -> None:
    change(tmp_path)
    before = (tmp_path / "out" / "metrics.jsonl").read_bytes(), (tmp_path / "out" / "run.json").read_bytes()
    done = run(2, "resume_from_checkpoint=true")
    assert done.code == 2
    assert said in done.err and "put them back, or choose another output_dir" in done.err
    assert len(done.err.split("a resumed run keeps them:")[1].strip().splitlines()) == 2
    assert before == ((tmp_path / "out" / "metrics.jsonl").read_bytes(), (tmp_path / "out" / "run.json").read_bytes())


def test_other_held_out_rows_are_told(run: Run, tmp_path: Path) -> None:
    write_rows(tmp_path / "held_out.jsonl", "bye", 4)
    done = run(2, "resume_from_checkpoint=true")
    assert done.code == 0
    assert "dataset_val: was '4 examples, " in done.err and "not comparable with those before" in done.err


def test_a_run_of_a_version_without_fingerprints_goes_on(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "out" / "run.json"
    record = json.loads(file.read_text())
    for start in record["starts"]:
        del start["inputs"]
    file.write_text(json.dumps(record))
    write_rows(tmp_path / "rows.jsonl", "howdy")
    done = run(2, "resume_from_checkpoint=true")
    assert done.code == 0
    assert "kept no fingerprints: whether rows and weights are still the same is not checked" in done.err
