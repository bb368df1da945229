"""The fused loss on real bf16 hidden states: SmolLM2-135M as teacher, 12 of its 30 layers as student."""

import copy
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from divergence_cases import CASES, Case
from torch import Tensor, nn

from kdtune.checkpoint import load_model
from kdtune.losses import HiddenSignal, KDLoss
from kdtune.models import Transformer
from kdtune.pruning.prune import keep_layers

STUDENT_LAYERS = [*range(6), *range(24, 30)]


@dataclass(frozen=True)
class Real:
    hidden: Tensor
    teacher_hidden: Tensor
    output: nn.Linear
    labels: Tensor


@pytest.fixture(scope="module")
def real(smollm2_gguf: Path) -> Real:
    """bf16 hidden states of both models on text that the teacher wrote, and the head they share."""
    teacher = load_model(smollm2_gguf, dtype=torch.float32).requires_grad_(False)
    tokens = written_by(teacher, rows=2, length=33)
    teacher.bfloat16()
    student = keep_layers(teacher, STUDENT_LAYERS)
    hidden, teacher_hidden = (model(tokens[:, :-1], return_hidden=True) for model in (student, teacher))
    return Real(hidden, teacher_hidden, teacher.output, tokens[:, 1:])


def written_by(model: Transformer, rows: int, length: int) -> Tensor:
    """Text as the model itself writes it, sampled from its first token on."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.ones(rows, 1, dtype=torch.int64)
    while tokens.shape[1] < length:
        p = model(tokens)[:, -1].softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(p, 1, generator=generator)], dim=1)
    return tokens


@pytest.mark.real
@pytest.mark.parametrize("kd_ratio", [0, 0.5, 1])
def test_gradient_in_bf16(real: Real, kd_ratio: float) -> None:
    hidden = real.hidden.clone().requires_grad_()
    signal = HiddenSignal(real.teacher_hidden, real.output)
    loss, parts = KDLoss(kd_ratio=kd_ratio, chunk_size=24)(hidden, real.output, signal, real.labels)
    (grad,) = torch.autograd.grad(loss, hidden)

    exact_hidden, weight = real.hidden.double().requires_grad_(), real.output.weight.double()
    logq = (exact_hidden @ weight.T).log_softmax(-1)
    logp = (real.teacher_hidden.double() @ weight.T).log_softmax(-1)
    ce = -logq.gather(-1, real.labels[..., None]).sum()
    kd = (logp.exp() * (logp - logq)).sum()
    expected = (1 - kd_ratio) * ce + kd_ratio * kd
    (exact,) = torch.autograd.grad(expected, exact_hidden)

    assert hidden.dtype == grad.dtype == torch.bfloat16
    # Each log-probability is rounded in fp32, to about 1e-6 of 20; which way depends on the processor's matrix product.
    assert loss.item() == pytest.approx(expected.item(), rel=5e-5)
    assert parts["class_loss"].item() == pytest.approx(ce.item(), rel=1e-5)
    assert (grad.double() - exact).norm() < 0.005 * exact.norm()


@pytest.mark.real
@pytest.mark.slow("32 divergences in float64 over 49,152 ids take 40 seconds")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradient_of_every_divergence_in_bf16(real: Real, case: Case) -> None:
    """To the rounding of a bf16 gradient, where logits in bf16 are wrong by some percent (linkedin/Liger-Kernel issue 1432)."""
    hidden = real.hidden.clone().requires_grad_()
    signal = HiddenSignal(real.teacher_hidden, real.output)
    loss, _ = KDLoss(case.divergence, kd_ratio=1.0, chunk_size=24)(hidden, real.output, signal, real.labels)
    (grad,) = torch.autograd.grad(loss, hidden)
    weight, exact_hidden = real.output.weight.double(), real.hidden.double().flatten(0, 1).requires_grad_()
    logp = (real.teacher_hidden.double().flatten(0, 1) @ weight.T).log_softmax(-1)
    (exact,) = torch.autograd.grad(case.exact((exact_hidden @ weight.T).log_softmax(-1), logp).sum(), exact_hidden)
    assert (grad.double().flatten(0, 1) - exact).norm() < 0.005 * exact.norm()


@pytest.fixture(scope="module")
def pair(smollm2_gguf: Path) -> tuple[Transformer, HiddenSignal, Tensor]:
    """The student, and what its teacher says to a text of its own."""
    teacher = load_model(smollm2_gguf, dtype=torch.float32).requires_grad_(False)
    tokens = written_by(teacher, rows=1, length=17)
    signal = HiddenSignal(teacher(tokens[:, :-1], return_hidden=True), teacher.output)
    return keep_layers(teacher, STUDENT_LAYERS), signal, tokens


@pytest.mark.real
@pytest.mark.slow("ten steps of a real model for each of 32 divergences")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ten_steps_of_a_real_pair(pair: tuple[Transformer, HiddenSignal, Tensor], case: Case) -> None:
    """The loss on the batch is finite and falls; the forward KL is measured beside it."""
    student, signal, tokens = copy.deepcopy(pair[0]), *pair[1:]
    for parameter in student.layers.parameters():
        parameter.requires_grad_()
    loss_fn = KDLoss(case.divergence, kd_ratio=0.9)
    optimizer = torch.optim.AdamW(student.layers.parameters(), lr=1e-4)
    losses, forward_kl = [], []
    for _ in range(10):
        hidden = student(tokens[:, :-1], return_hidden=True)
        loss, _ = loss_fn(hidden, student.output, signal, tokens[:, 1:])
        (loss / tokens[:, 1:].numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item() / tokens[:, 1:].numel())
        with torch.no_grad():
            forward_kl.append(KDLoss(kd_ratio=1.0)(hidden, student.output, signal, tokens[:, 1:])[0].item())
    assert all(map(math.isfinite, losses)) and losses[-1] < 0.9 * losses[0]
    assert all(math.isfinite(one) and one >= 0 for one in forward_kl) and forward_kl[-1] != forward_kl[0]
