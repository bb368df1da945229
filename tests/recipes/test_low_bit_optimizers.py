"""torchao's optimizers in a recipe: their state in 8 or 4 bits, saved and resumed to the bit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from command_line import CLI
from safetensors.torch import load_file

RUN = ["run", "knowledge_distillation", "--config", "tiny/knowledge_distillation", "sample_prompts=[]", "save_every_n_steps=2",
       "run_val_every_n_steps=null", "max_steps_per_epoch=4", "optimizer.lr=1e-2"]  # fmt: skip


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchao compiles its step anew for each shape, which takes minutes and does not change what is computed."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("name", "most_apart"),
    [
        ("AdamW8bit", 0.02),
        pytest.param("AdamW4bit", 0.05, marks=pytest.mark.slow("one optimizer of few bits is in the quick tests")),
        pytest.param("AdamWFp8", 0.05, marks=pytest.mark.slow("one optimizer of few bits is in the quick tests")),
    ],
)
def test_a_run_is_near_adamws_and_resumed_to_the_bit(name: str, most_apart: float, cli: CLI, tmp_path: Path) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    optimizer = f"optimizer=torchao.optim.{name}"
    for command in ([*RUN, f"output_dir={tmp_path / 'adamw'}"], [*RUN[:-1], optimizer, RUN[-1], f"output_dir={whole}"]):
        done = cli(*command)
        assert done.code == 0, done.err
    ours, theirs = rows(whole), rows(tmp_path / "adamw")
    assert ours[1]["loss"] == theirs[1]["loss"] and ours[2]["loss"] == pytest.approx(theirs[2]["loss"], rel=1e-4)
    assert ours[-1]["loss"] == pytest.approx(theirs[-1]["loss"], rel=most_apart) and ours[-1]["lr"] == pytest.approx(
        theirs[-1]["lr"]
    )

    shutil.copytree(whole, part)
    shutil.rmtree(part / "final")
    shutil.rmtree(part / "step_4")
    done = cli(*RUN[:-1], optimizer, RUN[-1], f"output_dir={part}", "resume_from_checkpoint=true")
    assert done.code == 0, done.err
    end, resumed = (load_file(folder / "final" / "model.safetensors") for folder in (whole, part))
    assert all(torch.equal(end[key], resumed[key]) for key in end)
    assert [row["loss"] for row in rows(whole)[1:]] == [row["loss"] for row in rows(part)[1:]]
