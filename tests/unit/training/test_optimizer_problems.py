"""Optimizers and schedules that the recipes' loop cannot step, found before a weight is read."""

from types import SimpleNamespace
from typing import Any

import pytest

from kdtune.errors import ConfigError
from kdtune.training import plan_steps
from kdtune.training.optim import optimizer_problems

ADAMW = {"_component_": "torch.optim.AdamW", "lr": 1e-3}
SCHEDULES = "torch.optim.lr_scheduler"


@pytest.mark.parametrize(
    "optimizer",
    [
        ADAMW,
        {"_component_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9},
        {"_component_": "kdtune.training.Muon"},
        {"_component_": "kdtune.training.adamw", "fused": True},
        {"_component_": "torchao.optim.AdamW8bit"},
    ],
)
@pytest.mark.parametrize(
    "schedule",
    [
        None,
        {"_component_": "kdtune.training.get_cosine_schedule_with_warmup", "num_warmup_steps": 10},
        {"_component_": f"{SCHEDULES}.CosineAnnealingLR", "T_max": 10},
        {"_component_": f"{SCHEDULES}.OneCycleLR", "max_lr": 0.1, "total_steps": 10},
    ],
)
def test_what_can_be_stepped_passes(optimizer: Any, schedule: Any) -> None:
    if schedule and "OneCycle" in schedule["_component_"] and "Muon" in optimizer["_component_"]:
        pytest.skip("OneCycleLR cycles a momentum of one kind")
    assert optimizer_problems(optimizer, schedule) == []


@pytest.mark.parametrize(
    ("optimizer", "schedule", "words"),
    [
        ({"_component_": "torch.optim.LBFGS"}, None, "optimizer: the step of torch.optim.LBFGS needs closure"),
        ({"_component_": "torch.optim.SparseAdam"}, None, "takes sparse gradients"),
        ({**ADAMW, "lr": -1.0}, None, "optimizer: torch.optim.AdamW: cannot be made with lr=-1.0: Invalid learning rate: -1.0"),
        ({"_component_": "builtins.dict"}, None, "optimizer: builtins.dict gives a dict; must be a torch.optim.Optimizer"),
        (ADAMW, {"_component_": f"{SCHEDULES}.ReduceLROnPlateau"}, "ReduceLROnPlateau needs metrics"),
        (ADAMW, {"_component_": f"{SCHEDULES}.StepLR", "step_size": 0.5, "gamma": "x"}, "lr_scheduler: "),
        (ADAMW, {"_component_": f"{SCHEDULES}.OneCycleLR", "max_lr": 0.1}, "lr_scheduler: "),
        ({**ADAMW, "fused": True, "foreach": True}, None, "`fused` and `foreach` cannot be `True` together"),
        (ADAMW, {"_component_": f"{SCHEDULES}.StepLR", "step_size": 0}, "fails after step 1: ZeroDivisionError"),
        (ADAMW, {"_component_": f"{SCHEDULES}.CosineAnnealingLR", "T_max": 0}, "fails after step 1: ZeroDivisionError"),
        (ADAMW, {"_component_": f"{SCHEDULES}.ExponentialLR", "gamma": -1.0}, "makes the learning rate of step 2 -0.001"),
        (ADAMW, {"_component_": "builtins.dict"}, "lr_scheduler: builtins.dict gives a dict; must be an LRScheduler"),
    ],
)  # fmt: skip
def test_what_cannot_is_told(optimizer: Any, schedule: Any, words: str) -> None:
    (problem,) = optimizer_problems(optimizer, schedule)
    assert words in problem


WARMUP = {"_component_": "kdtune.training.get_linear_schedule_with_warmup", "num_warmup_steps": 10}


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        (WARMUP, "lr_scheduler.num_warmup_steps=10: longer than the 9 training steps"),
        ({"_component_": f"{SCHEDULES}.OneCycleLR", "max_lr": 0.1, "total_steps": 8},
         "lr_scheduler.total_steps=8: fewer than the 9 training steps; set it to 9"),
        ({"_component_": "kdtune.training.get_wsd_schedule", "num_warmup_steps": 1, "num_decay_steps": 9},
         "lr_scheduler.num_decay_steps=9: must be between 0 and the 9 training steps less the 1"),
        ({"_component_": f"{SCHEDULES}.PolynomialLR", "total_iters": 5, "power": -1.0}, "fails after step 5: ZeroDivisionError"),
    ],
)  # fmt: skip
def test_a_schedule_that_the_number_of_steps_does_not_fit_is_told_when_it_is_counted(
    schedule: dict[str, Any], words: str
) -> None:
    cfg = SimpleNamespace(optimizer=ADAMW, lr_scheduler=schedule, max_steps_per_epoch=None, epochs=3)
    with pytest.raises(ConfigError) as error:
        plan_steps(cfg, 6, 2)
    assert words in str(error.value)


def test_the_longest_warmup_and_cycle_pass() -> None:
    for schedule in (
        {**WARMUP, "num_warmup_steps": 9},
        {"_component_": f"{SCHEDULES}.OneCycleLR", "max_lr": 0.1, "total_steps": 9},
    ):
        cfg = SimpleNamespace(optimizer=ADAMW, lr_scheduler=schedule, max_steps_per_epoch=None, epochs=3)
        assert plan_steps(cfg, 6, 2) == (3, 9)
