"""Cross entropy and forward KL against torch's own loss from hidden states, F.linear_cross_entropy."""

import pytest
import torch
import torch.nn.functional as F

from kdtune.constants import IGNORE_INDEX
from kdtune.losses import HiddenSignal, KDLoss
from kdtune.models import OutputHead


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kd_ratio", [0.0, 1.0, 0.3])
def test_value_and_gradients(dtype: torch.dtype, kd_ratio: float) -> None:
    """The KL is torch's cross entropy with the teacher's probabilities less the teacher's entropy."""
    generator = torch.Generator().manual_seed(0)
    hidden, teacher_hidden = (torch.randn(2, 9, 16, generator=generator, dtype=dtype) for _ in range(2))
    heads = [OutputHead(16, 97).to(dtype) for _ in range(2)]
    for head in heads:
        head.weight.data = torch.randn(97, 16, generator=generator, dtype=dtype)
    labels = torch.randint(97, (2, 9), generator=generator)
    labels[0, 3:6] = IGNORE_INDEX
    found, gradients = [], []
    for is_ours in (True, False):
        h, w = hidden.clone().requires_grad_(), heads[0].weight
        if is_ours:
            loss, _ = KDLoss(kd_ratio=kd_ratio, chunk_size=5)(
                h, heads[0], HiddenSignal(teacher_hidden, heads[1]), labels
            )
        else:
            valid = labels != IGNORE_INDEX
            p = heads[1](teacher_hidden[valid]).detach().softmax(-1)
            ce = F.linear_cross_entropy(h[valid], w, labels[valid], reduction="sum")
            soft = F.linear_cross_entropy(h[valid], w, p, reduction="sum")
            loss = (1 - kd_ratio) * ce + kd_ratio * (soft + (p * p.log()).sum())
        found.append(loss.detach())
        gradients.append(torch.autograd.grad(loss, (h, w)))
    tolerance = {torch.float64: 1e-11, torch.float32: 2e-5}[dtype]
    torch.testing.assert_close(*found, rtol=tolerance, atol=tolerance)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
