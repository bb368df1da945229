"""`kdtune run evaluate run=DIR`: a finished run measured with its own data, teacher, tokenizer and divergence.

The witness is the run itself: the last validation in its metrics.jsonl.
"""

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
from command_line import CLI
from torch import Tensor

from kdtune.config.load import read_yaml

CHECKPOINTER = "checkpointer._component_=kdtune.checkpoint.Checkpointer"


class ReverseKL:
    """KL(student || teacher): a divergence of the user's own."""

    @staticmethod
    def divergence(student_logp_NV: Tensor, teacher_logp_NV: Tensor) -> Tensor:
        return (student_logp_NV.exp() * (student_logp_NV - teacher_logp_NV)).sum(-1)


def last_row(run: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return rows[-1]


def measured(folder: Path) -> dict[str, float]:
    return json.loads((folder / "results.json").read_text())["metrics"]


def train(cli: CLI, recipe: str, output_dir: Path, *overrides: str) -> Path:
    done = cli("run", recipe, "--config", f"tiny/{recipe}", f"output_dir={output_dir}", "sample_prompts=[]",
               "max_steps_per_epoch=2", "run_val_every_n_steps=1", *overrides)  # fmt: skip
    assert done.code == 0, done.err
    return output_dir


@pytest.fixture(scope="module")
def kd(cli: CLI, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Distilled by reverse KL from a random teacher, in other batches for validation, with a best step."""
    return train(cli, "knowledge_distillation", tmp_path_factory.mktemp("kd") / "run", "save_every_n_steps=1",
                 "kd_loss=test_evaluate_run.ReverseKL", "batch_size_val=3", "seed=7", "best_metric=val_kd_loss")  # fmt: skip


@pytest.fixture(scope="module")
def adapted(cli: CLI, good: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finetuned with LoRA from a folder; final/ is the adapter alone."""
    return train(cli, "finetune", tmp_path_factory.mktemp("lora") / "run", "~model", CHECKPOINTER,
                 f"checkpointer.checkpoint_dir={good / 'model'}", "save_weights=adapter", "save_every_n_steps=null")  # fmt: skip


def test_a_distilled_run_has_the_numbers_of_its_last_validation(cli: CLI, kd: Path) -> None:
    done = cli("run", "evaluate", f"run={kd}")
    assert done.code == 0, done.err
    found, last = measured(kd / "evaluation"), last_row(kd)
    for name in ("class_loss", "kd_loss", "agreement"):
        assert found[f"held_out/{name}"] == pytest.approx(last[f"val_{name}"], rel=1e-6), name
    first = json.loads((kd / "metrics.jsonl").read_text().splitlines()[0])
    assert found["held_out/teacher_class_loss"] == pytest.approx(first["val_teacher_class_loss"], rel=1e-6)
    resolved = read_yaml(kd / "evaluation/config.yaml")
    assert (resolved["batch_size"], resolved["seed"]) == (3, 7), "the random teacher's own seed"
    assert resolved["kd_loss"] == {"_component_": "test_evaluate_run.ReverseKL"}
    again = cli("run", "evaluate", "--config", str(kd / "evaluation/config.yaml"), f"output_dir={kd}/again")
    assert again.code == 0 and measured(kd / "again") == found, "what it wrote is a config of its own"


def test_steps_and_the_best_of_them(cli: CLI, kd: Path) -> None:
    rows = [json.loads(line) for line in (kd / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["val_kd_loss"] for row in rows if row["step"]}
    for weights, wanted in (("step_1", losses[1]), ("best", min(losses.values()))):
        done = cli("run", "evaluate", f"run={kd}", f"run_weights={weights}")
        assert done.code == 0, done.err
        assert measured(kd / f"evaluation_{weights}")["held_out/kd_loss"] == pytest.approx(wanted, rel=1e-6)


def test_checking_a_config_leaves_the_run_as_it_is(cli: CLI, kd: Path, tmp_path: Path) -> None:
    """What a killed run left half written is its own to remove when it goes on."""
    run = shutil.copytree(kd, tmp_path / "run", ignore=shutil.ignore_patterns("evaluation*"))
    left = run / f".step_9.partial-{socket.gethostname()}-999999999-0123abcd"
    left.mkdir()
    for command in (("validate", "evaluation"), ("run", "evaluate", "device=tpu")):
        done = cli(*command, f"run={run}", "run_weights=best")
        assert left.is_dir(), (command, done.out, done.err)
    assert done.code == 2


def test_an_adapter_alone_is_measured_on_its_base(cli: CLI, adapted: Path) -> None:
    done = cli("run", "evaluate", f"run={adapted}", f"output_dir={adapted}/out")
    assert done.code == 0, done.err
    found = measured(adapted / "out")
    assert found["held_out/class_loss"] == pytest.approx(last_row(adapted)["val_class_loss"], rel=1e-5)
    assert "held_out/kd_loss" not in found


def test_what_is_given_comes_before_what_the_run_says(cli: CLI, kd: Path, tmp_path: Path) -> None:
    text = tmp_path / "story.txt"
    text.write_text("Once there was a lamp. " * 5)
    done = cli("run", "evaluate", f"run={kd}", "dataset_val.split=train[:2]", f"output_dir={tmp_path}/out", "batch_size=1",
               f"perplexity_files=[{text}]")  # fmt: skip
    assert done.code == 0, done.err
    assert "quickstart (train[:2]): 2 examples" in done.err
    assert "perplexity/story" in measured(tmp_path / "out")
    without = cli(
        "run", "evaluate", f"run={kd}", "dataset_val=null", f"output_dir={tmp_path}/texts", f"perplexity_files=[{text}]"
    )
    assert without.code == 0 and not [name for name in measured(tmp_path / "texts") if name.startswith("held_out")]
    refused = cli("run", "evaluate", f"run={kd}", "dataset_val.spilt=train", f"output_dir={tmp_path}/no")
    assert refused.code == 2 and "dataset_val.spilt" in refused.err


def test_what_is_no_finished_run_is_told(cli: CLI, kd: Path, good: Path, tmp_path: Path) -> None:
    unfinished = shutil.copytree(kd, tmp_path / "unfinished", ignore=shutil.ignore_patterns("final", "evaluation*"))
    random_base = train(cli, "finetune", tmp_path / "random", "save_weights=adapter", "save_every_n_steps=null")
    evaluated = tmp_path / "evaluated"
    assert cli("run", "evaluate", f"run={kd}", f"output_dir={evaluated}").code == 0
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/config.yaml").write_text("a: [")
    cases = {
        f"run={tmp_path}/nowhere": "no such folder; give the output_dir of a finished run",
        f"run={good}/model": "is no training run: it has no config.yaml",
        f"run={evaluated}": "is no training run: its config.yaml is of evaluate",
        f"run={tmp_path}/damaged": "not valid YAML",
        f"run={unfinished}": "is not finished, it has no final/; resume it with resume_from_checkpoint=true, or measure "
        "what it has so far with run_weights=step_2",
        f"run={random_base}": "holds an adapter alone, for random weights that no file has",
        f"run={kd} run_weights=step_9": "has no such weights; there are final, step_1, step_2",
        f"run={random_base} run_weights=best": "the run has no best_metric; give one of final",
        f"run={kd} run_weights=../..": "has no such weights",
        "--config tiny/evaluate run_weights=best": "run_weights=best: has no effect without run",
    }  # fmt: skip
    for overrides, words in cases.items():
        done = cli("run", "evaluate", *overrides.split(), f"output_dir={tmp_path}/out")
        assert done.code == 2 and words in done.err, (overrides, done.err)
        assert not (tmp_path / "out").exists()


@pytest.mark.slow("two captures, a run and three evaluations; what is asked of a cache is in test_cached_runs.py")
def test_a_run_from_a_cache_has_the_numbers_of_its_last_validation(cli: CLI, tmp_path: Path) -> None:
    """By the teacher of its held-out examples, a cache of theirs; without one, and on other examples, the cross entropy alone."""
    for split in ("train", "test"):
        done = cli("run", "cache_teacher", "--config", "tiny/cache_teacher", f"dataset.split={split}", "dataset_val=null",
                   "stored_dtype=fp32", "quality_examples=1", f"output_dir={tmp_path / split}")  # fmt: skip
        assert done.code == 0, done.err
    cached = [
        "~teacher_model",
        "teacher=kdtune.teachers.CachedTeacher",
        f"teacher.path={tmp_path / 'train'}",
        "save_every_n_steps=null",
    ]
    run = train(cli, "knowledge_distillation", tmp_path / "run", *cached, f"teacher.validation={tmp_path / 'test'}",
                "kd_loss=kdtune.losses.ReverseKL")  # fmt: skip
    assert cli("run", "evaluate", f"run={run}").code == 0
    found, row = measured(run / "evaluation"), last_row(run)
    for name in ("class_loss", "kd_loss", "forward_kl", "agreement"):
        assert found[f"held_out/{name}"] == pytest.approx(row[f"val_{name}"], rel=1e-5), name
    assert "held_out/teacher_class_loss" in found
    refused = cli("run", "evaluate", f"run={run}", "inspect=2", f"output_dir={tmp_path / 'inspected'}")
    assert refused.code == 2 and "inspect=2: needs a teacher that is a model; give teacher_checkpointer" in refused.err
    alone = [
        "dataset_val=kdtune.data.quickstart_dataset",
        "dataset_val.split=test[:5]",
        f"output_dir={tmp_path / 'alone'}",
    ]
    done = cli("run", "evaluate", f"run={run}", *alone)
    assert done.code == 0 and "held_out/kd_loss" not in measured(tmp_path / "alone"), done.err
