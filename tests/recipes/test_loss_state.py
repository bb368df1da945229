"""Losses with state in the recipe: what a resumed run restores of them, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from command_line import CLI
from safetensors.torch import load_file

# Of a row of metrics.jsonl, what a clock or the machine says.
MEASURED = {"time", "step_seconds", "data_seconds", "tokens_per_second", "peak_memory_rss"}
RUN = ("run", "knowledge_distillation", "--config", "tiny/knowledge_distillation", "sample_prompts=[]", "max_steps_per_epoch=4",
       "gradient_accumulation_steps=1", "batch_size=2", "dataset_val.split=test[:2]", "run_val_every_n_steps=null",
       "save_every_n_steps=2")  # fmt: skip
HIDDEN = ("hidden_loss=kdtune.losses.HiddenStateLoss", "hidden_loss.weight=2.0")
OWN = """
class Growing:
    share = 1.0

    def divergence(self, student, teacher):
        return self.share * (teacher.exp() * (teacher - student)).sum(-1)

    def state_dict(self):
        return {"share": self.share}

    def load_state_dict(self, state_dict):
        self.share = state_dict["share"]

    def after_step(self, step, num_steps, kd_loss):
        self.share += kd_loss
        return {"share": self.share}
"""
TAID = ("kd_loss=kdtune.losses.TAID", "kd_loss.rate=1.0")


def rows(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in found]


@pytest.mark.parametrize("loss", [TAID, HIDDEN, ("kd_loss=own_state.Growing",)], ids=["TAID", "hidden", "own"])
def test_a_resumed_run_is_the_uninterrupted_one(
    loss: tuple[str, ...], cli: CLI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_state.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert cli(*RUN, *loss, f"output_dir={whole}").code == 0
    # What a run killed in its third step leaves.
    shutil.copytree(whole, cut, ignore=shutil.ignore_patterns("final", "step_4"))
    done = cli(*RUN, *loss, f"output_dir={cut}", "resume_from_checkpoint=true")
    assert done.code == 0, done.err
    assert rows(cut) == rows(whole)
    for folder in ("final", "step_4"):
        assert (cut / folder / "model.safetensors").read_bytes() == (whole / folder / "model.safetensors").read_bytes()
    if loss is TAID:
        shares = [row["taid_share"] for row in rows(cut) if "loss" in row]
        assert shares[0] == 0.4 and shares == sorted(shares) and shares[2] > 0.4 + 0.6 * 2 / 4
    elif loss is HIDDEN:
        steps = [row for row in rows(whole) if "loss" in row]
        assert steps[-1]["val_hidden_loss"] < rows(whole)[0]["val_hidden_loss"]
        assert all(row["hidden_loss"] > 0 for row in rows(cut) if "loss" in row)
        assert not any("maps" in name for name in load_file(whole / "final" / "model.safetensors"))


def test_a_changed_rate_leaves_the_maps_own(cli: CLI, tmp_path: Path) -> None:
    """`resume_changes` of optimizer.lr, beside a parameter group that the optimizer's settings do not name."""
    assert cli(*RUN, *HIDDEN, f"output_dir={tmp_path}", "max_steps_per_epoch=2").code == 0
    done = cli(*RUN, *HIDDEN, f"output_dir={tmp_path}", "resume_from_checkpoint=true", "optimizer.lr=5e-3",
               "resume_changes=[optimizer.lr]")  # fmt: skip
    assert done.code == 0, done.err
    state = json.loads((tmp_path / "step_4" / "state" / "state.json").read_text())
    assert [group["initial_lr"] for group in state["optimizers"][0]["groups"]] == [5e-3, 1e-3]
    assert state["loss"]["tensors"] == ["loss.hidden_loss.maps.0.weight", "loss.hidden_loss.maps.1.weight"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("teacher_processes=1",), "hidden_loss: needs the hidden states of a teacher in the same processes"),
        (("hidden_loss.layers=[0.0]",), "hidden_loss.layers=[0.0]: must be fractions of depth"),
        (
            ("model.num_layers=1",),
            "of a model with 1 layers they are layers [1, 1], one of them twice; give fractions that are "
            "further apart (the student)",
        ),
        (("hidden_loss.layers=[0.6,0.5]", "model.num_layers=8"), "of a model with 3 layers they are layers [2, 2]"),
    ],
)
def test_refused_when_the_config_is_read(settings: tuple[str, ...], said: str, cli: CLI, tmp_path: Path) -> None:
    done = cli(*RUN, *HIDDEN, *settings, f"output_dir={tmp_path / 'out'}")
    assert done.code == 2 and said in done.err
    assert not (tmp_path / "out").exists()
