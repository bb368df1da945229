"""Losses on the real pair, SmolLM2-135M-Instruct and 12 of its layers, through the recipe."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from command_line import CLI

MEASURED = {"time", "step_seconds", "data_seconds", "tokens_per_second", "peak_memory_rss"}
# A student with bytes for tokens.
OTHER = ["~checkpointer", "~adapter", "~save_weights", "tokenizer={_component_: kdtune.tokenizers.byte_tokenizer, max_seq_len: 96}",
         "model={_component_: kdtune.models.llama, vocab_size: 320, embed_dim: 64, num_layers: 2, num_heads: 4, num_kv_heads: 2, "
         "intermediate_dim: 128, max_seq_len: 256, tie_embeddings: true}"]  # fmt: skip
# What has state, random numbers, parameters or tokens of its own; the divergences themselves: tests/unit/losses.
CASES = {
    "TAID": ["kd_loss=kdtune.losses.TAID"],
    "sampled": ["teacher_targets={_component_: kdtune.losses.SampledTargets, num_samples: 64}"],
    "hidden states": [
        "hidden_loss=kdtune.losses.HiddenStateLoss",
        "hidden_loss.projection=true",
        "hidden_loss.kind=cosine",
    ],
    "another tokenizer": [*OTHER, "kd_loss=kdtune.losses.HybridULD"],
    "another tokenizer, likelihoods": [*OTHER, "kd_loss=kdtune.losses.presets.alm"],
}


def rows(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in found]


@pytest.mark.real
@pytest.mark.slow("ten steps of a real model, and five again, for each of five losses")
@pytest.mark.parametrize("case", CASES)
def test_ten_steps_fall_and_resume_to_the_bit(case: str, real_pair: Path, cli: CLI, tmp_path: Path) -> None:
    """On one example, ten times; the forward KL of each validation is beside whatever is trained."""
    weights = "={_component_: kdtune.checkpoint.Checkpointer, checkpoint_dir: %s}"
    run = ("run", "knowledge_distillation", "--config", "tiny/knowledge_distillation", "~model", "~teacher_model", "kd_ratio=1.0",
           "checkpointer" + weights % (real_pair / "student"), "teacher_checkpointer" + weights % (real_pair / "teacher"),
           f"tokenizer={{_component_: kdtune.tokenizers.load, path: {real_pair / 'teacher'}, max_seq_len: 24}}",
           "adapter=kdtune.models.apply_lora", "save_weights=adapter", "optimizer.lr=3e-3", "~lr_scheduler", "batch_size=1",
           "gradient_accumulation_steps=1", "dataset.split=train[:1]", "dataset.prompt=plain", "dataset_val.split=train[:1]",
           "dataset_val.prompt=plain", "epochs=10", "max_steps_per_epoch=1", "sample_prompts=[]", *CASES[case])  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = cli(*run, f"output_dir={whole}")
    assert done.code == 0, done.err
    # What a run killed in its sixth step leaves.
    shutil.copytree(whole, cut, ignore=shutil.ignore_patterns("final", "step_10"))
    done = cli(*run, f"output_dir={cut}", "resume_from_checkpoint=true")
    assert done.code == 0, done.err
    assert rows(cut) == rows(whole)
    for file in (whole / "final").rglob("*.safetensors"):
        assert (cut / file.relative_to(whole)).read_bytes() == file.read_bytes()
    found = [row for row in rows(whole) if "val_kd_loss" in row]
    assert len(found) == 3 and all(math.isfinite(row["val_kd_loss"]) for row in found)
    name = "val_kd_loss" if "tokenizer" in case else "val_forward_kl"
    assert found[-1][name] < 0.9 * found[0][name]
