"""Losses with state in the recipe: what a resumed run restores of them, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from command_line import CLI

# Of a row of metrics.jsonl, what a clock or the machine says.
MEASURED = {"time", "step_seconds", "tokens_per_second", "peak_memory_rss"}
RUN = ("run", "knowledge_distillation", "--config", "tiny/knowledge_distillation", "sample_prompts=[]", "max_steps_per_epoch=4",
       "gradient_accumulation_steps=1", "batch_size=2", "dataset_val=null", "run_val_every_n_steps=null",
       "save_every_n_steps=2")  # fmt: skip
TAID = ("kd_loss=kdtune.losses.TAID", "kd_loss.rate=1.0")


def rows(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in found]


@pytest.mark.parametrize("loss", [TAID], ids=["TAID"])
def test_a_resumed_run_is_the_uninterrupted_one(loss: tuple[str, ...], cli: CLI, tmp_path: Path) -> None:
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
