"""What the distributed tests run, and how they compare two runs."""

import json
import os
from pathlib import Path

import pytest
from safetensors.torch import load_file

# Everything, which takes minutes more on two cores.
FULL = bool(os.environ.get("KDTUNE_TEST_FULL"))
# 3 or 5 batches to validate on: no number of processes here has equal parts of them.
HELD_OUT = "dataset_val.split=test[:9]"
KD = ["run", "knowledge_distillation", "--config", "tiny/knowledge_distillation", HELD_OUT]
FINETUNE = ["run", "finetune", "--config", "tiny/finetune", HELD_OUT]
EVALUATE = ["run", "evaluate", "--config", "tiny/evaluate"]
GENERATE = ["run", "generate", "--config", "tiny/generate"]
# Of a row of metrics.jsonl, what a clock or the machine says.
MEASURED = {"time", "step_seconds", "data_seconds", "tokens_per_second", "peak_memory_rss"}
# Of a teacher that is read from files or is on other processes these count less; test_same_numbers compares them.
OPERATIONS = {"flops", "total_flops"}
# Adam would hide a gradient's scale. Clipping is active: every norm is above 0.05.
PLAIN = ["optimizer=torch.optim.SGD", "optimizer.lr=0.3", "~lr_scheduler", "clip_grad_norm=0.05", "batch_size=2",
         "sample_prompts=[]", "save_every_n_steps=null", "max_steps_per_epoch=5", "tokenizer.max_seq_len=96"]  # fmt: skip
ADAPTERS = {
    "full": ["adapter=null"],
    "lora": ["adapter=kdtune.models.apply_lora", "adapter.lora_dropout=0.1", "optimizer.lr=3.0"],
    "dora": ["adapter=kdtune.models.apply_lora", "adapter.use_dora=true", "adapter.apply_lora_to_output=true", "optimizer.lr=3.0"],
    "qdora": ["adapter=kdtune.models.apply_lora", "adapter.use_dora=true", "adapter.quantize_base=true", "optimizer.lr=3.0"],
}  # fmt: skip
COPY = ["teacher_parallelism=kdtune.distributed.Parallelism", "teacher_parallelism.dp_shard=1",
        "teacher_parallelism.dp_replicate=-1"]  # fmt: skip


def rows(output_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def check_same_rows(found: list[dict], expected: list[dict], tolerance: float = 1e-5) -> None:
    """Losses, norms and validations are equal; speed, memory and operations may differ."""
    assert [row.keys() for row in found] == [row.keys() for row in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for name in theirs.keys() - MEASURED - OPERATIONS:
            assert ours[name] == pytest.approx(theirs[name], rel=tolerance, abs=1e-7), (theirs["step"], name)


def check_same_change(found: Path, expected: Path, start: Path, tolerance: float = 1e-3) -> None:
    """What training changed is the same, as a share of the whole change."""
    begin, ours, theirs = (load_file(folder / "model.safetensors") for folder in (start, found, expected))
    changes = [(ours[name] - begin[name], theirs[name] - begin[name]) for name in begin]
    whole = sum(change.square().sum() for _, change in changes).sqrt()
    assert whole > 0.01
    difference = sum((one - other).square().sum() for one, other in changes).sqrt()
    assert difference < tolerance * whole
