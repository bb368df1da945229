"""The fused loss on real bf16 hidden states: SmolLM2-135M as teacher, 12 of its 30 layers as student."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
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
