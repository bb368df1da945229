"""Changed arguments of an optimizer over a saved state: the groups have the new values, and all else what was saved."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from kdtune.checkpoint.state import state_writer
from kdtune.config import instantiate
from kdtune.training import load_training_state, resume_extra, trainable_parameters

COSINE = {"_component_": "torch.optim.lr_scheduler.CosineAnnealingLR", "T_max": 10}
ADAMW = {"_component_": "kdtune.training.adamw", "lr": 0.1, "weight_decay": 0.5}
MUON = {"_component_": "kdtune.training.Muon", "lr": 0.1}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(4, 4)


def prepare(optimizer: dict, lr_scheduler: dict | None) -> tuple[Any, Model, Any, Any]:
    cfg = SimpleNamespace(optimizer=optimizer, lr_scheduler=lr_scheduler, resume_changes=[])
    model = Model()
    made = instantiate(optimizer, params=trainable_parameters(model))
    return cfg, model, made, instantiate(lr_scheduler, optimizer=made)


def train(model: Model, optimizer: Any, scheduler: Any, steps: int) -> None:
    for _ in range(steps):
        model.inner(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()


@pytest.fixture
def resumed(tmp_path: Path):
    """Three steps with one config, then the state under another: both optimizers."""

    def resumed(before: tuple[dict, dict | None], now: tuple[dict, dict | None]) -> tuple[Any, Any]:
        cfg, model, old, scheduler = prepare(*before)
        train(model, old, scheduler, 3)
        extra = {**resume_extra(cfg, (1, 2)), "step": 3}
        (tmp_path / "state").mkdir()
        state_writer(model=model, optimizer=old, scheduler=scheduler, extra=extra)(tmp_path / "state", None)
        cfg, model, new, scheduler = prepare(*now)
        found = load_training_state(tmp_path / "state", cfg, model=model, optimizer=new, scheduler=scheduler)
        assert found["position"] == [1, 2]
        for one, other in zip(old.param_groups, new.param_groups, strict=True):
            for ours, theirs in zip(one["params"], other["params"], strict=True):
                assert old.state[ours].keys() == new.state[theirs].keys() and old.state[ours]
                for key, value in old.state[ours].items():
                    assert torch.equal(value, new.state[theirs][key]), key
        return old, new

    return resumed


def uninterrupted(optimizer: dict, lr_scheduler: dict | None, steps: int) -> list[float]:
    _, model, made, scheduler = prepare(optimizer, lr_scheduler)
    train(model, made, scheduler, steps)
    return [group["lr"] for group in made.param_groups]


def rates(optimizer: Any) -> list[float]:
    return [group["lr"] for group in optimizer.param_groups]


@pytest.mark.parametrize("now", [(ADAMW | {"lr": 0.02}, COSINE), (ADAMW, COSINE | {"T_max": 5}), (ADAMW, None),
                                 (ADAMW | {"lr": 0.02}, None)], ids=["lr", "schedule", "none", "both"])  # fmt: skip
def test_the_rate_is_that_of_a_run_that_had_it_from_the_start(resumed, now) -> None:
    _, new = resumed((ADAMW, COSINE), now)
    assert rates(new) == uninterrupted(*now, 3)
    assert [group["weight_decay"] for group in new.param_groups] == [0.5, 0.0]


def test_each_half_of_muon_has_its_own(resumed) -> None:
    old, new = resumed((MUON, COSINE), (MUON | {"adamw_lr": 0.03}, COSINE))
    assert rates(new)[0] == rates(old)[0] and rates(new)[1] == pytest.approx(0.3 * rates(old)[1])
    assert rates(new) == uninterrupted(MUON | {"adamw_lr": 0.03}, COSINE, 3)


def test_other_arguments_leave_the_rate_as_it_was(resumed) -> None:
    old, new = resumed((ADAMW, COSINE), (ADAMW | {"weight_decay": 0.25, "betas": [0.8, 0.9]}, COSINE))
    assert rates(new) == rates(old)
    assert [group["weight_decay"] for group in new.param_groups] == [0.25, 0.0]
    assert all(tuple(group["betas"]) == (0.8, 0.9) for group in new.param_groups)


def test_a_rate_in_a_tensor_is_filled_in_place(resumed, tmp_path: Path) -> None:
    before = {"_component_": f"{__name__}.tensor_sgd", "lr": 0.1}
    _, new = resumed((before, COSINE), (before | {"lr": 0.02}, COSINE))
    rate = new.param_groups[0]["lr"]
    assert isinstance(rate, torch.Tensor)
    assert float(rate) == pytest.approx(uninterrupted(ADAMW | {"lr": 0.02}, COSINE, 3)[0], rel=1e-6)


def tensor_sgd(params: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=torch.tensor(lr), capturable=False, foreach=False)
