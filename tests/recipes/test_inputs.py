"""What a run starts from: a resumed run has the same rows and weights, and no example is longer than a model's context."""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from shutil import copytree
from types import SimpleNamespace
from typing import Any

import pytest
from command_line import CLI, Outcome
from safetensors.torch import load_file, save_file

from kdtune.checkpoint import Checkpointer
from kdtune.data.micro_batches import is_padding_free

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


def test_a_run_of_a_version_that_kept_less_of_the_tokenizer_goes_on(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "out" / "run.json"
    record = json.loads(file.read_text())
    del record["starts"][0]["inputs"]["tokenizer"]["tool_template"]
    file.write_text(json.dumps(record))
    done = run(2, "resume_from_checkpoint=true")
    assert done.code == 0, done.err


def a_list(tokenizer: Any = None) -> Any:
    """A component that is neither a dataset nor a tokenizer, and whose annotations do not say so."""
    return [1, 2]


ROWS_OF_TEXT = "{_component_: kdtune.data.text_completion_dataset, source: short.jsonl, column: output}"
MIXED = f"{{_component_: kdtune.data.mixed_dataset, weights: [1, 1], datasets: [{ROWS_OF_TEXT}, {{_component_: test_inputs.a_list}}]}}"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ((KD, "dataset=test_inputs.a_list"), "dataset: test_inputs.a_list returns a list, not a dataset"),
        ((FINETUNE, "dataset_val=test_inputs.a_list"), "dataset_val: test_inputs.a_list returns a list, not a dataset"),
        ((FINETUNE, f"dataset={MIXED}"), "datasets.1 is a list, not a dataset"),
        (("evaluate", "dataset_val=test_inputs.a_list"), "dataset_val: test_inputs.a_list returns a list"),
        (("quantize", "dataset_val=test_inputs.a_list"), "dataset_val: test_inputs.a_list returns a list"),
        (("prune", "dataset=test_inputs.a_list"), "dataset: test_inputs.a_list returns a list"),
        ((FINETUNE, "tokenizer=test_inputs.a_list"), "tokenizer: test_inputs.a_list returns a list, not a tokenizer"),
    ],
    ids=lambda value: value[0] + " " + value[1][:14] if isinstance(value, tuple) else "",
)
def test_what_a_builder_returns_is_looked_at(
    argv: tuple[str, ...], said: str, cli: CLI, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    copytree(good / "model", "model")
    write_rows(Path("short.jsonl"), "x", 2)
    recipe, *settings = argv
    done = cli("run", recipe, "--config", f"tiny/{recipe}", "output_dir=out", *settings)
    assert done.code == 2 and said in done.err, done.err
    assert not Path("out").exists()


def test_an_unknown_device_is_told_with_what_else_is_wrong(cli: CLI) -> None:
    for recipe in (KD, FINETUNE, "evaluate", "quantize", "prune", "generate"):
        done = cli("validate", f"tiny/{recipe}", "device=tpu", "model=null", "checkpointer=null")
        assert done.code == 2 and "device=tpu: unknown" in done.err and "checkpointer: missing" in done.err, done.err


LONG = "x" * 300  # with the template around it, more than the tiny models' 256 tokens
LONG_ROWS = ("dataset=kdtune.data.alpaca_dataset", "dataset.source=rows.jsonl")
SHORT_ROWS = ("dataset=kdtune.data.alpaca_dataset", "dataset.source=short.jsonl")
HELD_OUT = ("dataset_val=kdtune.data.alpaca_dataset", "dataset_val.source=rows.jsonl")
STREAM = (*LONG_ROWS, "dataset.streaming=true")
NO_LIMIT = "~tokenizer.max_seq_len"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ((KD, *LONG_ROWS), "dataset: 2 of 2 examples are longer than the 256 tokens that model has for its context"),
        ((KD, *SHORT_ROWS, *HELD_OUT), "dataset_val: 2 of 2 examples are longer than the 256 tokens that model has"),
        (
            (KD, *LONG_ROWS, "model.max_seq_len=512", "~teacher_model", checkpointer("teacher_checkpointer", "model")),
            "256 tokens that teacher_checkpointer=model has",
        ),
        (
            (KD, *STREAM),
            "dataset: is read as it is needed, .* tokenizer.max_seq_len is not set; model has a context of 256",
        ),
        ((FINETUNE, *LONG_ROWS), "dataset: 2 of 2 examples are longer"),
        (
            (FINETUNE, *SHORT_ROWS, "dataset_val=null", "run_val_every_n_steps=null", f"sample_prompts=[{LONG}]"),
            r"sample_prompts: prompt 1 has 3\d\d tokens, which leaves no room",
        ),
        (("evaluate", *HELD_OUT), "dataset_val: 2 of 2 examples are longer"),
        (("evaluate", "max_seq_length=257"), "max_seq_length=257: .* has a context of 256 tokens"),
        (("quantize", *HELD_OUT), "dataset_val: 2 of 2 examples are longer"),
        (("prune", *LONG_ROWS), "dataset: 2 of 2 examples are longer"),
        (("generate", f"prompt={LONG}"), r"prompt 1: 3\d\d tokens; the model's context is 256"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_what_is_longer_than_a_context(
    argv: tuple[str, ...], said: str, cli: CLI, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Checkpointer, "load", lambda *_, **__: pytest.fail("weights were read"))
    copytree(good / "model", "model")
    write_rows(Path("rows.jsonl"), LONG, 2)
    write_rows(Path("short.jsonl"), "x", 2)
    recipe, *settings = argv
    where = () if recipe == "generate" else ("output_dir=out", NO_LIMIT)
    done = cli("run", recipe, "--config", f"tiny/{recipe}", *where, *settings)
    assert done.code == 2
    assert re.search(said, done.err), done.err
    assert "tokenizer.max_seq_len=256" in done.err or "dataset" not in said
    assert not Path("out").exists()


def test_a_limit_that_cuts_them_or_a_builder_with_room_lets_them_through(
    cli: CLI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(Path("rows.jsonl"), LONG, 2)
    short = (*SHORT, "dataset_val=null", "max_steps_per_epoch=1", "save_every_n_steps=null")
    for number, settings in enumerate(
        (["tokenizer.max_seq_len=256", *STREAM], ["tokenizer.max_seq_len=2048", "model.max_seq_len=512", *LONG_ROWS])
    ):
        done = cli("run", FINETUNE, "--config", "tiny/finetune", f"output_dir=out{number}", *short, *settings)
        assert done.code == 0, done.err


def test_a_limit_above_a_context_is_noted_and_does_no_harm_to_shorter_examples(
    cli: CLI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = ("tokenizer.max_seq_len=2048", "teacher_model.max_seq_len=512", "dataset_val=null", "output_dir=out")
    note = "note: tokenizer.max_seq_len=2048 is above a model's context (model: 256, teacher_model: 512 tokens)"
    for command in ("validate", "plan"):
        done = cli(command, "tiny/knowledge_distillation", "run_val_every_n_steps=null", *settings)
        assert done.code == 0 and note in done.out
    assert "note" not in cli("validate", "tiny/knowledge_distillation").out
    write_rows(Path("short.jsonl"), "x", 2)
    short = (*SHORT, *SHORT_ROWS, "max_steps_per_epoch=1")
    done = cli("run", KD, "--config", "tiny/knowledge_distillation", *short, *settings)
    assert done.code == 0, done.err


def test_packs_are_not_padded(cli: CLI, tmp_path: Path) -> None:
    run = ["run", "knowledge_distillation", "--config", "tiny/knowledge_distillation", f"output_dir={tmp_path / 'out'}",
           "dataset.packed=true"]  # fmt: skip
    done = cli(*run, "padding_free=false")
    assert done.code == 2 and "dataset.packed=true: padding its documents" in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("padding_free", "teacher", "expected"),
    [
        (None, None, True),
        (None, {"_component_": "kdtune.teachers.BaseOfStudent"}, True),
        (None, {"_component_": "types.SimpleNamespace"}, False),
        (True, {"_component_": "types.SimpleNamespace"}, True),
        (False, None, False),
    ],
)
def test_only_a_teacher_of_ones_own_may_want_a_row_an_example(
    padding_free: bool | None, teacher: dict[str, str] | None, expected: bool
) -> None:
    assert is_padding_free(SimpleNamespace(padding_free=padding_free, teacher=teacher)) == expected
