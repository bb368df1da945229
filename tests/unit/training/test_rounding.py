"""Which weights do not move: what is foretold of an optimizer, beside what its steps do."""

import logging

import pytest
import torch
from torch import nn

from kdtune.models import apply_lora, llama
from kdtune.training import Muon, lost_share, trainable_parameters, warn_of_lost_updates


def model(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    made = llama(
        vocab_size=500, embed_dim=64, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_dim=128, max_seq_len=64
    )
    for parameter in made.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.05)
    return made.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rate", [1e-5, 1e-4, 1e-3])
def test_the_share_is_that_of_the_weights_that_do_not_move(dtype: torch.dtype, rate: float) -> None:
    """One step of Adam, whose first update is the learning rate for every weight with a gradient."""
    trained = model(dtype)
    before = [parameter.detach().clone() for parameter in trained.parameters()]
    optimizer = torch.optim.Adam(trainable_parameters(trained), lr=rate)
    foretold = lost_share(optimizer)
    logits = trained(torch.arange(64).view(2, 32))
    (logits.float() * torch.randn(500)).sum().backward()
    reached = [parameter.grad.abs() > 1e-4 for parameter in trained.parameters()]
    optimizer.step()
    pairs = zip(trained.parameters(), before, reached, strict=True)
    unmoved = torch.cat([(now == was)[there] for now, was, there in pairs]).float().mean().item()
    assert foretold == pytest.approx(unmoved, abs=0.03)
    assert (foretold > 0.5) == (dtype == torch.bfloat16 and rate < 1e-3)


def lines(optimizer: torch.optim.Optimizer) -> list[str]:
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("kdtune.training.rounding")
    logger.addHandler(handler)
    warn_of_lost_updates(optimizer)
    logger.removeHandler(handler)
    return found


@pytest.mark.parametrize("make", [torch.optim.AdamW, Muon])
def test_a_line_says_it_with_what_to_set(make) -> None:
    (line,) = lines(make(trainable_parameters(model(torch.bfloat16)), lr=1e-5))
    assert "optimizer.lr=1e-05 leaves 9" in line and "dtype=fp32" in line and "parallelism.param_dtype=bf16" in line


def test_nothing_is_said_where_weights_move_or_updates_have_no_size() -> None:
    half = model(torch.bfloat16)
    assert lines(torch.optim.SGD(trainable_parameters(half), lr=1e-5)) == []
    assert lines(torch.optim.AdamW(trainable_parameters(half), lr=3e-3)) == []
    assert lines(torch.optim.AdamW(trainable_parameters(model(torch.float32)), lr=1e-5)) == []
    adapted = torch.optim.AdamW(trainable_parameters(apply_lora(half)), lr=3e-4)
    assert lost_share(adapted) < 0.5 and lines(adapted) == []
    rounded = torch.optim.AdamW(trainable_parameters(model(torch.bfloat16)), lr=1e-5)
    rounded.bf16_stochastic_round = True
    assert lines(rounded) == []


@pytest.mark.parametrize("rounds", [False, True])
def test_stochastic_rounding_moves_bf16_weights_at_a_small_rate(rounds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty steps of 1e-5 along a constant gradient: on average the -2e-4 that fp32 makes, or nearly nothing without it."""
    from torchao.optim import AdamW8bit

    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    torch.manual_seed(0)
    start = torch.empty(128, 256).normal_(std=0.5)
    bf16, fp32 = (torch.nn.Parameter(start.bfloat16().to(dtype)) for dtype in (torch.bfloat16, torch.float32))
    made = [
        AdamW8bit([bf16], lr=1e-5, weight_decay=0.0, bf16_stochastic_round=rounds),
        AdamW8bit([fp32], lr=1e-5, weight_decay=0.0),
    ]
    for _ in range(20):
        for parameter, optimizer in zip((bf16, fp32), made, strict=True):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
    moved, expected = (float((one.detach().float() - start.bfloat16().float()).mean()) for one in (bf16, fp32))
    assert expected == pytest.approx(-2e-4, rel=0.02)
    assert (moved == pytest.approx(expected, rel=0.05)) if rounds else abs(moved) < 0.1 * abs(expected)
