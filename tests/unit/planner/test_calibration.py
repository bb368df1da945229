"""`kdtune plan --calibrate`: what is timed, and how few layers stand for all. No test looks at a real clock."""

from typing import Any

import pytest
import torch
from exit_codes import run_command

from kdtune import models
from kdtune._assets import find_recipe
from kdtune.config import load
from kdtune.config.recipe import import_recipe
from kdtune.errors import ConfigError
from kdtune.planner.calibration import Calibration, Timer, calibrate
from kdtune.training import steps_of


def config(recipe: str, *overrides: str) -> Any:
    return load(f"tiny/{recipe}", list(overrides), import_recipe(find_recipe(recipe)).schema)


def calibrated(cfg: Any) -> Calibration:
    """From one micro-batch of its data."""
    return calibrate(cfg, *steps_of(cfg), budget=0.0)


@pytest.mark.parametrize("num_layers", [1, 2, 3, 7])
def test_a_few_layers_stand_for_all(num_layers: int) -> None:
    """With a clock that a layer moves by 0.5 s, and all else by 2 s."""
    now = 0.0

    def run(model: models.Transformer) -> None:
        nonlocal now
        now += 2.0 + 0.5 * len(model.layers)

    model = models.llama(
        vocab_size=8, embed_dim=8, num_layers=num_layers, num_heads=2, intermediate_dim=8, max_seq_len=8
    )
    model.layers = model.layers[:3]
    found = Timer(torch.device("cpu"), clock=lambda: now).of_all_layers(run, model)
    assert found == pytest.approx(2.0 + 0.5 * num_layers)


def test_the_micro_batches_are_the_runs_own() -> None:
    cfg = config("knowledge_distillation", "tokenizer.max_seq_len=64")
    found = calibrated(cfg)
    assert found.num_batches == 1
    step = next(steps_of(cfg)[0])
    assert len(step) == 2 and found.tokens == sum(batch.num_tokens for batch in step)
    assert min(found.teacher, found.student, found.loss, found.optimizer) > 0
    assert found.step == pytest.approx(found.teacher + found.student + found.loss + found.optimizer)


@pytest.mark.parametrize(
    "overrides",
    [
        ["adapter=kdtune.models.apply_lora", "enable_activation_checkpointing=true"],
        ["adapter=kdtune.models.apply_lora", "adapter.quantize_base=true", "model.embed_dim=64"],
        ["dtype=bf16", "teacher_quantization=int8_weight_only"],
    ],
)
def test_adapters_and_quantized_weights_are_timed(overrides: list[str]) -> None:
    assert calibrated(config("knowledge_distillation", "tokenizer.max_seq_len=32", *overrides)).step > 0


def test_finetuning_has_no_teacher() -> None:
    found = calibrated(config("finetune", "tokenizer.max_seq_len=32"))
    assert found.teacher == 0 and "teacher" not in found.text()


def test_what_is_not_timed_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="teacher_processes is set.*~teacher_processes"):
        calibrated(config("knowledge_distillation", "teacher_processes=1"))
    assert run_command(["plan", "tiny/finetune", "--calibrate", "--world-size", "8"]) == 2
    assert "--calibrate: it times one process" in capsys.readouterr().err
