"""bf16 weights updated in fp32: an fp32 copy against a run in fp32, stochastic rounding against its exact probabilities."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from kdtune.checkpoint import load_state
from kdtune.checkpoint.state import state_writer
from kdtune.models import Transformer, llama
from kdtune.training import Muon, trainable_parameters
from kdtune.training.fp32_updates import round_stochastically, update_in_fp32
from kdtune.training.in_backward import step_in_backward

OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=1e-4),
    "adamw": partial(torch.optim.AdamW, lr=1e-5),
    "fused adamw": partial(torch.optim.AdamW, lr=1e-5, fused=True),
    "muon": partial(Muon, lr=1e-5),
}


def model(dtype: torch.dtype) -> Transformer:
    torch.manual_seed(0)
    shape = {"embed_dim": 16, "num_layers": 2, "num_heads": 4, "intermediate_dim": 24}
    return llama(vocab_size=31, **shape, max_seq_len=32, tie_embeddings=True).bfloat16().to(dtype)


def gradients(student: nn.Module, step: int) -> None:
    """Gradients that bf16 holds exactly, the same for the same step."""
    generator = torch.Generator().manual_seed(step)
    for parameter in student.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).bfloat16().to(parameter.dtype)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_master_weights_are_those_of_a_run_in_fp32(name: str) -> None:
    """To the bit, with the state; the bf16 weights are they, rounded."""
    ours, theirs = model(torch.bfloat16), model(torch.float32)
    one, other = (OPTIMIZERS[name](trainable_parameters(student)) for student in (ours, theirs))
    update_in_fp32(one, "fp32_master")
    for step in range(3):
        for student, optimizer in ((ours, one), (theirs, other)):
            gradients(student, step)
            optimizer.step()
    for found, wanted in zip(ours.parameters(), theirs.parameters(), strict=True):
        state = dict(one.state[found])
        assert torch.equal(state.pop("fp32_master"), wanted) and torch.equal(found, wanted.bfloat16())
        assert state.keys() == other.state.get(wanted, {}).keys()
        assert all(torch.equal(state[key], value) for key, value in other.state.get(wanted, {}).items())
    before = model(torch.bfloat16).parameters()
    assert any(not torch.equal(now, then) for now, then in zip(ours.parameters(), before, strict=True))


def test_a_value_goes_up_as_often_as_it_is_near_the_upper_neighbour() -> None:
    for value in (1.0, -1.0 - 2**-9, 1.0 + 3 * 2**-10, 3e-20, -0.0):
        values = torch.full((40_000,), value)
        down = (values.view(torch.int32) & -(2**16)).view(torch.float32)  # towards zero
        up = ((values.view(torch.int32) & -(2**16)) + 2**16).view(torch.float32)
        rounded = round_stochastically(values, (1, 2)).float()
        assert ((rounded == down) | (rounded == up)).all()
        share = ((values - down) / (up - down))[0].item()
        assert (rounded == up).float().mean().item() == pytest.approx(share, abs=0.01)
        assert rounded.mean().item() == pytest.approx(value, rel=1e-4)
    half = torch.full((1000,), 1.0 + 2**-9)
    assert torch.equal(round_stochastically(half, (3, 1)), round_stochastically(half, (3, 1)))
    assert not torch.equal(round_stochastically(half, (3, 1)), round_stochastically(half, (3, 2)))
    infinite = torch.tensor([torch.inf, -torch.inf])
    assert torch.equal(round_stochastically(infinite, (0,)).float(), infinite)


@pytest.mark.parametrize("rate", [1e-4, 1e-6])
def test_small_updates_survive_on_average(rate: float) -> None:
    """Forty steps of Adam along a constant gradient move each weight by forty times the rate; nearest rounding loses it."""
    start = torch.empty(256, 1024).normal_(std=0.5, generator=torch.Generator().manual_seed(0)).bfloat16()
    moved = {}
    for rounding in (None, "stochastic", "fp32_master"):
        weight = nn.Parameter(start.clone())
        optimizer = torch.optim.AdamW([weight], lr=rate, weight_decay=0.0)
        if rounding is not None:
            update_in_fp32(optimizer, rounding)  # type: ignore[arg-type]
        for _ in range(40):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        now = optimizer.state[weight].get("fp32_master", weight.detach())
        moved[rounding] = (now.float() - start.float()).mean().item() / (-40 * rate)
    assert moved["fp32_master"] == pytest.approx(1, rel=0.01)
    assert moved["stochastic"] == pytest.approx(1, rel=0.05 if rate > 1e-5 else 0.5)
    assert abs(moved[None]) < 0.5


@pytest.mark.parametrize("rounding", ["stochastic", "fp32_master"])
def test_in_backward_and_resumed_it_is_the_same(rounding, tmp_path: Path) -> None:
    tokens = torch.randint(0, 31, (2, 9), generator=torch.Generator().manual_seed(0))

    def steps(student: Transformer, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            student(tokens).float().logsumexp(-1).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    def made(in_backward: bool = False) -> tuple[Transformer, torch.optim.Optimizer]:
        student = model(torch.bfloat16)
        optimizer = torch.optim.AdamW(trainable_parameters(student), lr=1e-3)
        update_in_fp32(optimizer, rounding, seed=7)
        if in_backward:
            step_in_backward(optimizer)
        return student, optimizer

    whole, backward, first, second = made(), made(in_backward=True), made(), made()
    steps(*whole, 4)
    steps(*backward, 4)
    steps(*first, 2)
    state_writer(model=first[0], optimizer=first[1], extra={})(tmp_path)
    second[0].load_state_dict(first[0].state_dict())
    load_state(tmp_path, model=second[0], optimizer=second[1])
    steps(*second, 2)
    for student, _ in (backward, second):
        assert all(torch.equal(one, other) for one, other in zip(student.parameters(), whole[0].parameters(), strict=True))  # fmt: skip
