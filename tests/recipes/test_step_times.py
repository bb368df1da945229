"""A step's time is the step's alone, from the first one on: validations and samples are not in it."""

import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdtune import evaluation, training

A_VALIDATION = 1000


@pytest.mark.parametrize(("recipe", "name"), [("knowledge_distillation", "evaluate_kd"), ("finetune", "evaluate_ce")])
def test_no_step_has_a_validation_in_its_time(
    recipe: str, name: str, cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.count()  # a clock that each look at it moves by a second, and each validation by a thousand
    evaluate = getattr(evaluation, name)

    def slow(*args: Any, **more: Any) -> Any:
        for _ in range(A_VALIDATION):
            next(ticks)
        return evaluate(*args, **more)

    monkeypatch.setattr(evaluation, name, slow)
    clocked = functools.partial(training.Metrics, clock=lambda: float(next(ticks)))
    monkeypatch.setattr("kdtune.training.run.Metrics", clocked)
    done = cli(
        "run", recipe, "--config", f"tiny/{recipe}", f"output_dir={tmp_path / 'run'}", "max_steps_per_epoch=3",
        "run_val_every_n_steps=1", "sample_prompts=[]",
    )  # fmt: skip
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    seconds = [row["step_seconds"] for row in rows if "step_seconds" in row]
    assert len(seconds) == 3 and max(seconds) < A_VALIDATION
    assert next(ticks) > 4 * A_VALIDATION, "the validations were made, and took their time"
