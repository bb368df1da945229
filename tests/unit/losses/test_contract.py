"""What a divergence must be, and which ids it is taken over where the student's head has rows that the teacher's has not."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdtune.constants import IGNORE_INDEX
from kdtune.errors import ConfigError
from kdtune.losses import (
    DivergenceLoss,
    ForwardKLLoss,
    HiddenSignal,
    KDLoss,
    Mixture,
    ReverseKL,
    WeightedSum,
    check_divergence,
    covers_extra_ids,
    divergence_name,
    divergence_of,
    forward_kl,
)
from kdtune.losses.contract import over_student_ids

Function = Callable[[Tensor, Tensor], object]


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    return (student.exp() * (student - teacher)).sum(-1)


def jensen_shannon(student: Tensor, teacher: Tensor) -> Tensor:
    middle = torch.logaddexp(student, teacher) - math.log(2)
    of_teacher = (teacher.exp() * (teacher - middle)).masked_fill(teacher.isinf(), 0)
    return (of_teacher + student.exp() * (student - middle)).sum(-1) / 2


def total_variation(student: Tensor, teacher: Tensor) -> Tensor:
    return (student.exp() - teacher.exp()).abs().sum(-1) / 2


def top_k(student: Tensor, teacher: Tensor) -> Tensor:
    values, ids = teacher.topk(100)
    return forward_kl(student.gather(1, ids).log_softmax(-1), values.log_softmax(-1))


def unmasked(student: Tensor, teacher: Tensor) -> Tensor:
    """Forward KL with 0 * inf in it."""
    return (teacher.exp() * (teacher - student)).sum(-1)


class Loss:
    def __init__(self, function: Function) -> None:
        self.divergence = function


@pytest.mark.parametrize("function", [forward_kl, reverse_kl, jensen_shannon, total_variation, top_k, unmasked])
def test_divergences_pass(function: Function) -> None:
    before = torch.get_rng_state()
    with torch.inference_mode():
        check_divergence(Loss(function))
    check_divergence(ForwardKLLoss())
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (lambda s, t: unmasked(s, t).mean(), r"gives a tensor of shape \[\] for 3 tokens; allowed is .* \[3\]"),
        (lambda s, t: unmasked(s, t).sum(), r"a tensor of shape \[\] for 3 tokens"),
        (lambda s, t: (t.exp() * (t - s)).sum(0), r"a tensor of shape \[4096\] for 3 tokens"),
        (lambda s, t: unmasked(s, t)[:, None], r"a tensor of shape \[3, 1\] for 3 tokens"),
        (lambda s, t: unmasked(s, t).mean().expand(len(s)), "for tokens that come alone"),
        (lambda s, t: unmasked(s, t).bfloat16(), "values in bfloat16"),
        (lambda s, t: unmasked(s, t).tolist(), "gives a list"),
        (lambda s, t: unmasked(s, t).detach(), "without a gradient to the student"),
        (lambda s, t: (s.argmax(-1) == t.argmax(-1)).float(), "without a gradient to the student"),
        (lambda s, t: (s - t).log().sum(-1), "gives the values .nan"),
        (lambda s, t: (s - s.detach()).sqrt().sum(-1), "a gradient that is not finite"),
        (lambda s: s.sum(-1), r"raised TypeError: .* both \[3, 4096\]"),
        (None, "Loss has no divergence; allowed is"),
    ],
)
def test_what_is_no_divergence_is_refused_by_name(function: Function, found: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s)^kd_loss: .*{found}"):
        check_divergence(Loss(function))


@pytest.mark.parametrize("mean_of", [torch.mean, torch.sum])
def test_the_losses_refuse_it_too(mean_of: Callable[[Tensor], Tensor]) -> None:
    def scalar(student: Tensor, teacher: Tensor) -> Tensor:
        return mean_of(unmasked(student, teacher))

    logits, labels = torch.randn(3, 5, 7, requires_grad=True), torch.ones(3, 5, dtype=torch.int64)
    head = nn.Linear(7, 7, bias=False)
    message = r"scalar gives a tensor of shape \[\] for 15 tokens"
    with pytest.raises(ConfigError, match=message):
        DivergenceLoss(scalar)(logits, logits.detach(), labels)
    with pytest.raises(ConfigError, match=message):
        KDLoss(scalar)(logits, head, HiddenSignal(logits, head), labels)


@pytest.mark.parametrize(
    ("function", "covers"),
    [
        (forward_kl, True),
        (jensen_shannon, True),
        (total_variation, True),
        (top_k, True),
        (reverse_kl, False),
        (unmasked, False),
        (lambda s, t: unmasked(s, t).mean(), False),
    ],
)
def test_which_are_finite_where_the_teacher_has_no_id(function: Function, covers: bool) -> None:
    assert covers_extra_ids(function) == covers


@pytest.mark.parametrize("function", [forward_kl, reverse_kl, jensen_shannon, unmasked])
@pytest.mark.parametrize("kd_ratio", [0.25, 1.0])
def test_against_plain_logits_in_float64(function: Function, kd_ratio: float) -> None:
    """A student of 9 ids, a teacher of 6: value and gradient by autograd over distributions written out."""
    generator = torch.Generator().manual_seed(0)
    hidden, theirs = torch.randn(2, 2, 7, 4, generator=generator, dtype=torch.float64)
    ours, head = nn.Linear(4, 9, bias=False).double(), nn.Linear(4, 6, bias=False).double()
    labels = torch.randint(6, (2, 7), generator=generator)
    labels[0, :3] = IGNORE_INDEX
    valid = labels != IGNORE_INDEX
    hidden.requires_grad_()

    logits, teacher = (hidden @ ours.weight.T)[valid], (theirs @ head.weight.T).detach()[valid].softmax(-1)
    p, q = F.pad(teacher, (0, 3)), logits.softmax(-1)
    if function is forward_kl:
        kd = (teacher * (teacher.log() - q[:, :6].log())).sum()
    elif function is jensen_shannon:
        m = (p + q) / 2
        kd = ((teacher * (teacher / m[:, :6]).log()).sum() + (q * (q / m).log()).sum()) / 2
    else:
        shared = q[:, :6] / q[:, :6].sum(-1, keepdim=True)
        one, other = (shared, teacher) if function is reverse_kl else (teacher, shared)
        kd = (one * (one / other).log()).sum()
    ce = -q.gather(1, labels[valid][:, None]).log().sum()
    expected = (1 - kd_ratio) * ce + kd_ratio * kd
    wanted = torch.autograd.grad(expected, (hidden, ours.weight))

    loss, parts = KDLoss(Loss(function), kd_ratio=kd_ratio, chunk_size=4)(
        hidden, ours, HiddenSignal(theirs, head), labels
    )
    found = torch.autograd.grad(loss, (hidden, ours.weight))
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-12)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)
    values = {name: part.item() for name, part in parts.items() if name != "agreement"}
    outside = q[:, 6:].sum().item()
    assert values == pytest.approx({"class_loss": ce.item(), "kd_loss": kd.item(), "student_mass_outside": outside})

    mean = DivergenceLoss(function)(hidden @ ours.weight.T, theirs @ head.weight.T, labels)
    assert mean.item() == pytest.approx(kd.item() / int(valid.sum()), rel=1e-12)


def test_the_cross_entropy_is_the_same_with_a_teacher_as_without() -> None:
    torch.manual_seed(0)
    hidden, labels = torch.randn(2, 7, 4), torch.randint(6, (2, 7))
    ours, head = nn.Linear(4, 9, bias=False), nn.Linear(4, 6, bias=False)
    with_teacher = KDLoss(kd_ratio=0.5)(hidden, ours, HiddenSignal(hidden, head), labels)[1]
    assert with_teacher["class_loss"] == KDLoss(kd_ratio=0.0)(hidden, ours, None, labels)[1]["class_loss"]


def test_the_divergence_keeps_its_name_where_it_is_cut() -> None:
    with pytest.raises(ConfigError, match="the divergence .*short gives"):

        def short(student: Tensor, teacher: Tensor) -> Tensor:
            return reverse_kl(student, teacher) if len(student) == 3 else reverse_kl(student, teacher)[1:]

        head, hidden = nn.Linear(4, 6, bias=False), torch.randn(1, 5, 4)
        signal = HiddenSignal(hidden, nn.Linear(4, 5, bias=False))
        assert over_student_ids(short, 6, 5) is not short
        KDLoss(Loss(short))(hidden, head, signal, torch.zeros(1, 5, dtype=torch.int64))


class Sharpened:
    """Its method is named divergence; formula, state and name stand beside it."""

    name = "sharpened"

    def __init__(self) -> None:
        self.power = 1.0
        self.formulas = 0

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        return self.power * forward_kl(student, teacher)

    def value_and_gradient(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        self.formulas += 1
        return self.divergence(student, teacher), -self.power * teacher.exp()

    def state_dict(self) -> dict[str, float]:
        return {"power": self.power}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self.power = state_dict["power"]

    def after_step(self, step: int, num_steps: int, kd_loss: float) -> dict[str, float]:
        self.power += 1.0
        return {"power": self.power}


@pytest.mark.parametrize("within", [lambda own: own, lambda own: WeightedSum([own, ReverseKL()], [1.0, 1e-9])])
def test_an_object_keeps_its_state_and_formula_where_its_divergence_is_a_method(
    within: Callable[[Sharpened], Function],
) -> None:
    own = Sharpened()
    loss = KDLoss(within(own), kd_ratio=1.0)
    check_divergence(own)
    hidden, output, teacher = (
        torch.randn(2, 3, 4).requires_grad_(),
        nn.Linear(4, 9, bias=False),
        nn.Linear(4, 9, bias=False),
    )
    signal, labels = HiddenSignal(torch.randn(2, 3, 4), teacher), torch.randint(9, (2, 3))
    assert loss.after_step(1, 2, 0.5) == {"power": 2.0} and list(loss.state_dict().values()) == [2.0]
    found, _ = loss(hidden, output, signal, labels)
    p = teacher(signal.hidden_BSD).flatten(0, 1).log_softmax(-1)
    expected = 2.0 * F.kl_div(output(hidden).flatten(0, 1).log_softmax(-1), p, log_target=True, reduction="sum")
    for ours, theirs in zip(
        *(torch.autograd.grad(one, (hidden, output.weight)) for one in (found, expected)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert own.formulas == 1
    again = Sharpened()
    resumed = KDLoss(within(again))
    resumed.load_state_dict(loss.state_dict())
    assert again.power == 2.0
    assert divergence_name(own) == divergence_name(divergence_of(own)) == "sharpened"


def test_a_class_stands_for_one_with_its_default_settings() -> None:
    student, teacher = (torch.randn(3, 7).log_softmax(-1) for _ in range(2))
    found = WeightedSum([ReverseKL, Sharpened], [0.5, 2.0])
    expected = 0.5 * reverse_kl(student, teacher) + 2 * unmasked(student, teacher)
    torch.testing.assert_close(found(student, teacher), expected)
    assert found.name == "0.5 reverse KL + 2 sharpened"
    with pytest.raises(ConfigError, match=r"kdtune.losses.divergences.mixture.Mixture needs settings .*'divergence'"):
        WeightedSum([Mixture], [1.0])
