"""Checking every step of a sweep: each finding once, and hundreds of cells in seconds."""

import time
from pathlib import Path

import pytest

from kdtune.sweeps import make_plan, step_problems
from kdtune.sweeps.check import recipe_schema

KD = "tiny/knowledge_distillation"


@pytest.mark.slow("checks five hundred configs, which is its point")
def test_five_hundred_cells_are_checked_in_seconds(tmp_path: Path) -> None:
    """Their own processor time: ten seconds is what a user waits, and this takes two or three."""
    axes = {"kd_ratio": [i / 10 for i in range(10)], "lr": [(i + 1) / 1000 for i in range(10)], "seed": [0, 1, 2, 3, 4]}
    overrides = [
        f"{key}={{{axis}}}" for key, axis in (("kd_ratio", "kd_ratio"), ("optimizer.lr", "lr"), ("seed", "seed"))
    ]
    overrides.append("tokenizer.max_seq_len=${{model.max_seq_len}}")
    recipe_schema("knowledge_distillation")  # imports torch
    start = time.process_time()
    plan = make_plan(steps_dir=tmp_path, steps={"train": {"config": KD, "overrides": overrides}}, axes=axes)
    assert len(plan.steps) == 500
    assert step_problems(plan, machine=False) == []
    assert time.process_time() - start < 10


def test_a_finding_of_many_cells_is_told_once(tmp_path: Path) -> None:
    steps = {"train": {"config": KD, "overrides": ["seed={seed}", "kd_ratio=2", "batch_sise=1"]}}
    found = step_problems(make_plan(steps_dir=tmp_path, steps=steps, axes={"seed": [0, 1, 2]}), machine=False)
    assert found == ["train: batch_sise: unknown key; did you mean 'batch_size'?"]
