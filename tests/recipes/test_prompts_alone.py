"""Runs whose data are prompts without answers: what data with answers gives, which are never read."""

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import CLI

from kdtune.tokenizers import byte_tokenizer

NUM_ROWS = 24
MEASURED = {"time", "step_seconds", "data_seconds", "generation_seconds", "tokens_per_second", "peak_memory_rss"}
RUN = ("run", "knowledge_distillation", "--config", "tiny/on_policy", "sample_prompts=[]", "dataset_val.split=test[:4]",
       "max_steps_per_epoch=2", "run_val_every_n_steps=2", "save_every_n_steps=1",
       "rollouts.max_new_tokens=6", "~lr_scheduler")  # fmt: skip


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Settings of a dataset of prompts, and of one with the same prompts and answers."""
    folder = tmp_path_factory.mktemp("rows")
    rows = [{"input": f"What is {i} times {i * i}?", "output": "x" * (i % 7 + 1)} for i in range(NUM_ROWS)]
    for name, kept in (("prompts", ("input",)), ("answers", ("input", "output"))):
        lines = [json.dumps({key: row[key] for key in kept}) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return {
        "prompts": ["dataset=kdtune.data.prompts_dataset", "dataset.column=input", f"dataset.source={folder / 'prompts.jsonl'}"],
        "answers": ["dataset=kdtune.data.instruct_dataset", f"dataset.source={folder / 'answers.jsonl'}"],
    }  # fmt: skip


def rows_of(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in found]


@pytest.mark.parametrize(
    "more",
    [
        pytest.param([], id="map"),
        pytest.param(
            ["tokens_per_micro_batch=150"], id="by tokens", marks=pytest.mark.slow("another layout of the same prompts")
        ),
        pytest.param(
            ["dataset.streaming=true", "num_workers=1"],
            id="stream",
            marks=pytest.mark.slow("the same rows, read as needed"),
        ),
    ],
)
def test_the_run_is_that_of_data_with_answers(
    more: list[str], sources: dict[str, list[str]], cli: CLI, tmp_path: Path
) -> None:
    for name, source in sources.items():
        done = cli(*RUN, *source, *more, "epochs=2", f"output_dir={tmp_path / name}")
        assert done.code == 0, done.err
    ours, theirs = tmp_path / "prompts", tmp_path / "answers"
    if not more:  # elsewhere micro-batches of the data, and so the order of sums, differ with its answers
        assert rows_of(ours) == rows_of(theirs)
    assert [row["rollout_tokens"] for row in rows_of(ours)[1:]] == [
        row["rollout_tokens"] for row in rows_of(theirs)[1:]
    ]
    weights = [(folder / "final" / "model.safetensors").read_bytes() for folder in (ours, theirs)]
    assert weights[0] == weights[1]
    for epochs in (1, 2) if more else ():  # resumed after the first
        done = cli(
            *RUN,
            *sources["prompts"],
            *more,
            f"output_dir={tmp_path / 'cut'}",
            f"epochs={epochs}",
            "resume_from_checkpoint=true",
        )
        assert done.code == 0, done.err
        if epochs == 2:
            assert (tmp_path / "cut" / "final" / "model.safetensors").read_bytes() == weights[0]


def test_answers_to_prompts_alone(sources: dict[str, list[str]], cli: CLI, tmp_path: Path) -> None:
    for name, source in sources.items():
        done = cli("run", "write_answers", "--config", "tiny/write_answers", *source, f"output_dir={tmp_path / name}")
        assert done.code == 0, done.err
    files = sorted((tmp_path / "prompts").glob("answers-*"))
    assert len(files) == 3
    assert all(file.read_bytes() == (tmp_path / "answers" / file.name).read_bytes() for file in files)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["rollouts.policy.student=0.9"], "dataset: kdtune.data.prompts_dataset has no answers, and they are needed here"),
        (["~rollouts"], "dataset: kdtune.data.prompts_dataset has no answers"),
        (["rollouts=kdtune.rollouts.Rollouts", "rollouts.policy=kdtune.rollouts.DistiLLMSchedule", "rollouts.buffer_size=9"],
         "dataset: kdtune.data.prompts_dataset has no answers"),
        (["dataset_val=kdtune.data.prompts_dataset", "dataset_val.source=none.jsonl"], "~dataset_val validates on nothing"),
        (["dataset.column=question"], "dataset: "),
    ],
)  # fmt: skip
def test_what_needs_answers_is_refused(
    changed: list[str], said: str, sources: dict[str, list[str]], cli: CLI, tmp_path: Path
) -> None:
    run = [one for one in RUN if "rollouts" not in one] if "~rollouts" in changed else RUN
    done = cli(*run, *sources["prompts"], *changed, f"output_dir={tmp_path / 'run'}")
    assert done.code == 2
    assert said in done.err
    assert not (tmp_path / "run").exists()


def test_a_prompt_as_long_as_the_context_is_refused(cli: CLI, tmp_path: Path) -> None:
    """Before weights are read: after it no answer could begin."""
    turn = [{"role": "user", "content": ""}]
    room = 256 - len(byte_tokenizer().tokenize_messages(turn, add_generation_prompt=True)[0])
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "x" * room}))
    done = cli(*RUN, "dataset=kdtune.data.prompts_dataset", f"dataset.source={tmp_path / 'rows.jsonl'}", "tokenizer.max_seq_len=null",
               "dataset_val=null", "run_val_every_n_steps=null", f"output_dir={tmp_path / 'run'}", "batch_size=1")  # fmt: skip
    assert (done.code, (tmp_path / "run").exists()) == (2, False)
    assert "1 of 1 examples are longer than the 256 tokens" in done.err
