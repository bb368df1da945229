"""Options that save memory where the student lies in shards."""

import shutil
from pathlib import Path

import pytest
import torch
from distributed_runs import KD, PLAIN, check_same_rows, rows
from safetensors.torch import load_file

OPTIONS = {
    "in backward": ["optimizer_in_backward=true", "~clip_grad_norm"],
    "selective": ["activation_checkpointing=selective", "~clip_grad_norm"],
    "every second layer": ["activation_checkpointing=2", "~clip_grad_norm"],
}


@pytest.mark.slow("three processes of the launcher for each option; pairs of options are tested in one process")
@pytest.mark.parametrize("name", OPTIONS)
def test_shards_give_the_numbers_of_one_process(name: str, launch, tmp_path: Path) -> None:
    layouts = {"one": (1, ["batch_size=4", "~clip_grad_norm"]), "two": (2, ["batch_size=2", *OPTIONS[name]])}
    for layout, (ranks, settings) in layouts.items():
        out = f"output_dir={tmp_path / layout}"
        run = [
            *KD,
            *PLAIN,
            "optimizer.lr=0.03",
            "gradient_accumulation_steps=1",
            "max_steps_per_epoch=3",
            *settings,
            out,
        ]
        ended = launch.kdtune(*run, ranks=ranks)
        assert [rank.code for rank in ended] == [0] * ranks, ended[0].text
    check_same_rows(rows(tmp_path / "two"), rows(tmp_path / "one"))


COPIES = ["parallelism.dp_shard=1", "parallelism.dp_replicate=-1"]
HALF = [
    "dtype=bf16",
    "~clip_grad_norm",
    "optimizer=torch.optim.AdamW",
    "optimizer.lr=1e-3",
    "gradient_accumulation_steps=1",
]


@pytest.mark.slow("six processes of the launcher; one process is in the quick tests")
@pytest.mark.parametrize("weight_update", ["fp32_master", "stochastic"])
def test_weights_updated_in_fp32_lie_in_shards_and_copies(weight_update: str, launch, tmp_path: Path) -> None:
    """As in one process, as far as gradients in bf16 are; a resumed run has the bits of an uninterrupted one."""
    layouts = {"one": (1, ["batch_size=4"]), "shards": (2, ["batch_size=2"]), "copies": (2, ["batch_size=2", *COPIES])}
    run = [*KD, *PLAIN, *HALF, f"weight_update={weight_update}", "max_steps_per_epoch=4", "save_every_n_steps=2"]
    for layout, (ranks, settings) in layouts.items():
        out = f"output_dir={tmp_path / layout}"
        ended = launch.kdtune(*run, *settings, out, ranks=ranks)
        assert [rank.code for rank in ended] == [0] * ranks, ended[0].text
        found, expected = ([row["loss"] for row in rows(tmp_path / name) if "loss" in row] for name in (layout, "one"))
        assert found == pytest.approx(expected, rel=1e-2) and found[-1] < found[0], layout
    whole = load_file(tmp_path / "shards" / "final" / "model.safetensors")
    for name in ("final", "step_4"):
        shutil.rmtree(tmp_path / "shards" / name)
    ended = launch.kdtune(
        *run, *layouts["shards"][1], f"output_dir={tmp_path / 'shards'}", "resume_from_checkpoint=true", ranks=2
    )
    assert [rank.code for rank in ended] == [0, 0], ended[0].text
    resumed = load_file(tmp_path / "shards" / "final" / "model.safetensors")
    assert all(torch.equal(resumed[key], value) for key, value in whole.items())
