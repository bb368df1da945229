"""TAID: its target's share of the teacher over the steps, its loss, and its state."""

import json
from typing import Any

import pytest
import torch

from kdtune.errors import ConfigError
from kdtune.losses import TAID, ForwardKL, KDLoss, Mixture, WeightedSum, check_divergence, divergence_name

# The divergence per token of four steps of ten, and the share of each step, worked out by hand from the paper's rule.
STEPS = (2.0, 1.5, 1.8, 1.2)
SHARES = {0.5: (0.4, 0.46, 0.59516875, 0.6964006, 0.77244479), 5e-4: (0.4, 0.46, 0.52, 0.58, 0.64)}


def trace(taid: TAID, losses: tuple[float, ...], *, first: int = 1, num_steps: int = 10) -> list[float]:
    """The share after each step."""
    for step, loss in enumerate(losses, first):
        was = taid.share
        assert taid.after_step(step, num_steps, loss) == {"taid_share": was}
    return [taid.share]


@pytest.mark.parametrize("rate", SHARES)
def test_the_share_is_the_papers_rule(rate: float) -> None:
    taid = TAID(rate=rate)
    found = [taid.share, *(trace(taid, (loss,), first=step)[0] for step, loss in enumerate(STEPS, 1))]
    assert found == pytest.approx(SHARES[rate], abs=1e-8)
    trace(taid, (1.0,) * 6, first=5)
    assert taid.share == 1.0


def test_the_share_is_the_same_after_a_resume() -> None:
    whole, first, second = TAID(rate=0.5), TAID(rate=0.5), TAID(rate=0.5)
    trace(whole, STEPS)
    trace(first, STEPS[:2])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    trace(second, STEPS[2:], first=3)
    assert second.state_dict() == whole.state_dict()


def test_state_of_a_loss_is_that_of_its_parts() -> None:
    def loss(taid: Any) -> KDLoss:
        return KDLoss(WeightedSum([ForwardKL(), taid], [0.5, 0.5]))

    one, other = TAID(rate=0.5), TAID(rate=0.5)
    assert loss(one).after_step(1, 10, 2.0) == {"taid_share": 0.4}
    assert set(loss(one).state_dict()) == {"kd_loss.1.share", "kd_loss.1.average", "kd_loss.1.before"}
    loss(other).load_state_dict(loss(one).state_dict())
    assert other.state_dict() == one.state_dict() and other.share == pytest.approx(0.46)
    assert KDLoss().state_dict() == {} == KDLoss().after_step(1, 2, 1.0)


def test_value_and_gradient_are_those_of_the_papers_loss() -> None:
    """Forward KL from softmax(share * t + (1 - share) * s), without a gradient through it, in float64."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 11, dtype=torch.float64)
    student.requires_grad_()
    taid = TAID(start=0.3)
    target = (0.3 * teacher + 0.7 * student.detach()).softmax(-1)
    expected = torch.nn.functional.kl_div(student.log_softmax(-1), target, reduction="none").sum(-1)
    (slope,) = torch.autograd.grad(expected.sum(), student, retain_graph=True)
    found = taid(student.log_softmax(-1), teacher.log_softmax(-1))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    (ours,) = torch.autograd.grad(found.sum(), student)
    torch.testing.assert_close(ours, slope, rtol=1e-12, atol=1e-14)
    for share in (0.2, 1.0):
        taid = TAID(start=share)
        expected = Mixture(ForwardKL(), share=share, alpha=1, replaces="teacher", detach=True)
        assert torch.equal(taid(student, teacher), expected(student, teacher))
    check_divergence(TAID())
    assert divergence_name(TAID(temperature=2.0)) == "TAID (T=2)"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"start": 0.0}, "start=0.0: must be above 0, at most 1"),
        ({"end": 0.3}, "end=0.3: must be from start=0.4 to 1"),
        ({"rate": -1.0}, "rate=-1.0: must be 0 or more"),
        ({"momentum": 1.0}, "momentum=1.0: must be from 0 to below 1"),
    ],
)
def test_settings_out_of_range(settings: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        TAID(**settings)
