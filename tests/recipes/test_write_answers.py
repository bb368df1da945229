"""Answers that a model writes once: the same files after every stop, and what learns from them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from command_line import CLI

from kdtune.tokenizers import byte_tokenizer

RUN = ("run", "write_answers", "--config", "tiny/write_answers")
KD = ("run", "knowledge_distillation", "--config", "tiny/knowledge_distillation", "sample_prompts=[]", "~lr_scheduler",
      "run_val_every_n_steps=null", "save_every_n_steps=null", "dataset_val=null", "dataset=kdtune.data.answers_dataset")  # fmt: skip


def rows(folder: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line) for file in sorted(folder.glob("answers-*.jsonl")) for line in file.read_text().splitlines()
    ]


@pytest.fixture(scope="module")
def answers(cli: CLI, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("answers") / "run"
    done = cli(*RUN, f"output_dir={folder}")
    assert done.code == 0, done.err
    assert "24 answers to 24 prompts" in done.out
    return folder


def test_every_prompt_has_its_answer(answers: Path) -> None:
    found = rows(answers)
    assert [row["example"] for row in found] == list(range(24))
    for row in found:
        length = len(row["ids"]) - row["prompt_length"]
        assert 1 <= length <= 16
        assert row["is_finished"] or length == 16
        assert row["mean_log_prob"] < 0
        asked = byte_tokenizer().decode(row["ids"][: row["prompt_length"]], skip_special=False)
        assert asked.startswith("<|im_start|>user\n") and asked.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert len({tuple(row["ids"][row["prompt_length"] :]) for row in found}) > 20
    assert sorted(file.name for file in answers.iterdir()) == [
        "answers-00000.jsonl", "answers-00001.jsonl", "answers-00002.jsonl", "answers.json", "config.yaml", "run.json",
    ]  # fmt: skip


def test_data_without_prompts_is_refused(cli: CLI, tmp_path: Path) -> None:
    done = cli(*RUN, f"output_dir={tmp_path / 'run'}", "dataset.train_on=all")
    assert done.code == 2
    assert "dataset: has no prompts to answer" in done.err and "set dataset.train_on=answers" in done.err
    assert not (tmp_path / "run").exists()


def test_a_stopped_run_goes_on_with_the_same_files(answers: Path, cli: CLI, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(answers, cut)
    (cut / "answers-00001.jsonl").unlink()
    done = cli(*RUN, f"output_dir={cut}", "slots=5")
    assert done.code == 0, done.err
    for file in answers.glob("answers-*.jsonl"):
        assert (cut / file.name).read_bytes() == file.read_bytes()
    again = cli(*RUN, f"output_dir={cut}")
    assert again.code == 0
    assert "is complete" in again.out


def test_the_best_of_several_are_kept(answers: Path, cli: CLI, tmp_path: Path) -> None:
    for name, more in (("all", ()), ("best", ("keep_best=2",))):
        done = cli(*RUN, f"output_dir={tmp_path / name}", "num_answers=4", "max_prompts=8", *more)
        assert done.code == 0, done.err
    every, best = rows(tmp_path / "all"), rows(tmp_path / "best")
    assert len(every) == 32 and len(best) == 16
    # The first of several is the one that is written alone.
    assert [row["ids"] for row in every[::4]] == [row["ids"] for row in rows(answers)[:8]]
    for start in range(8):
        of_prompt = sorted(every[4 * start : 4 * start + 4], key=lambda row: -row["mean_log_prob"])
        assert best[2 * start : 2 * start + 2] == of_prompt[:2]


def test_students_learn_from_the_answers(answers: Path, cli: CLI, tmp_path: Path) -> None:
    done = cli(*KD, "kd_ratio=0", f"dataset.source={answers}", f"output_dir={tmp_path / 'run'}")
    assert done.code == 0, done.err
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first = next(row for row in logged if "loss" in row)
    assert first["num_valid_tokens"] <= 8 * 16
    kept = cli("run", "cache_teacher", "--config", "tiny/cache_teacher", "dataset=kdtune.data.answers_dataset",
               f"dataset.source={answers}", f"output_dir={tmp_path / 'cache'}")  # fmt: skip
    assert kept.code == 0, kept.err
    cached = cli(*KD, "~teacher_model", "teacher=kdtune.teachers.CachedTeacher", f"teacher.path={tmp_path / 'cache'}",
                 f"dataset.source={answers}", f"output_dir={tmp_path / 'cached'}")  # fmt: skip
    assert cached.code == 0, cached.err


def changed(folder: Path, name: str, old: str, new: str) -> None:
    text = (folder / name).read_text()
    assert old in text
    (folder / name).write_text(text.replace(old, new, 1))


def test_what_is_not_the_answers_of_this_run_is_refused(answers: Path, cli: CLI, tmp_path: Path) -> None:
    other = cli(*RUN, f"output_dir={answers}", "seed=1", "temperature=0.5")
    assert other.code == 2
    assert "holds answers of another run, which differs in seed, temperature" in other.err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    assert "holds files, and no answers" in cli(*RUN, f"output_dir={tmp_path / 'full'}").err
    none = cli(*KD, "kd_ratio=0", f"dataset.source={tmp_path / 'full'}", f"output_dir={tmp_path / 'run'}")
    assert none.code == 2
    assert "holds no answers of `kdtune run write_answers`" in none.err
    cut = tmp_path / "cut"
    shutil.copytree(answers, cut)
    (cut / "answers-00002.jsonl").unlink()
    missing = cli(*KD, "kd_ratio=0", f"dataset.source={cut}", f"output_dir={tmp_path / 'run'}")
    assert missing.code == 2
    assert "1 of 3 files are missing, the first is answers-00002.jsonl" in missing.err
    damaged = tmp_path / "damaged"
    shutil.copytree(answers, damaged)
    changed(damaged, "answers-00000.jsonl", '"ids": [', '"ids": [-1, ')
    row = cli(*KD, "kd_ratio=0", f"dataset.source={damaged}", f"output_dir={tmp_path / 'run'}")
    assert row.code == 2
    assert "ids: whole numbers from 0 on expected" in row.err
    foreign = tmp_path / "foreign"
    shutil.copytree(answers, foreign)
    header = json.loads((foreign / "answers.json").read_text())
    key = next(iter(header["tokenizer"]))
    header["tokenizer"][key] = "another"
    (foreign / "answers.json").write_text(json.dumps(header))
    refused = cli(*KD, "kd_ratio=0", f"dataset.source={foreign}", f"output_dir={tmp_path / 'run'}")
    assert refused.code == 2
    assert f"another tokenizer than the run's (they differ in: {key})" in refused.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("temperature=0", "num_answers=2"), "num_answers=2: with temperature=0"),
        (("num_answers=2", "keep_best=2"), "keep_best=2: must be below num_answers=2"),
        (("temperature=-1",), "temperature=-1.0"),
        (("~model",), "checkpointer: missing"),
        (("parallelism.tp=2",), "parallelism.tp=2: each process writes"),
    ],
)
def test_bad_values_are_refused(more: tuple[str, ...], said: str, cli: CLI, tmp_path: Path) -> None:
    done = cli(*RUN, f"output_dir={tmp_path / 'run'}", *more)
    assert done.code == 2
    assert said in done.err
    assert not (tmp_path / "run").exists()
