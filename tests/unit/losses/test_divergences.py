import math

import pytest
import torch

from kdtune.losses import forward_kl

INF = math.inf


def logp(*p: float) -> torch.Tensor:
    return torch.tensor([p], dtype=torch.float64).log()


def test_equals_the_sum_written_out() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 11, dtype=torch.float64).log_softmax(-1)
    values = [
        sum(math.exp(t) * (t - s) for s, t in zip(student_row, teacher_row, strict=True))
        for student_row, teacher_row in zip(student.tolist(), teacher.tolist(), strict=True)
    ]
    assert forward_kl(student, teacher).tolist() == pytest.approx(values, rel=1e-12)


def test_agrees_with_torch_distributions() -> None:
    torch.manual_seed(1)
    student, teacher = torch.randn(2, 5, 11).log_softmax(-1)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=teacher), torch.distributions.Categorical(logits=student)
    )
    torch.testing.assert_close(forward_kl(student, teacher), expected)


def test_is_in_nats_and_has_a_direction() -> None:
    assert forward_kl(logp(0.5, 0.5), logp(1.0, 0.0)).item() == pytest.approx(math.log(2))
    assert forward_kl(logp(1.0, 0.0), logp(0.5, 0.5)).item() == INF


def test_is_zero_at_a_match() -> None:
    torch.manual_seed(2)
    p = (10 * torch.randn(5, 1000)).log_softmax(-1)
    assert forward_kl(p, p).tolist() == [0.0] * 5


@pytest.mark.parametrize(
    ("student", "teacher", "value"),
    [
        (logp(0.5, 0.5, 0.0), logp(0.25, 0.75, 0.0), 0.25 * math.log(0.5) + 0.75 * math.log(1.5)),  # both exclude an id
        (logp(0.5, 0.25, 0.25), logp(0.5, 0.5, 0.0), 0.5 * math.log(2)),  # the teacher does
        (logp(0.5, 0.5, 0.0), logp(0.5, 0.25, 0.25), INF),  # the student does, and the teacher does not
    ],
)
def test_excluded_ids(student: torch.Tensor, teacher: torch.Tensor, value: float) -> None:
    student.requires_grad_()
    kl = forward_kl(student, teacher)
    (grad,) = torch.autograd.grad(kl.sum(), student)
    assert kl.item() == pytest.approx(value)
    torch.testing.assert_close(grad, -teacher.exp())


def test_a_probability_that_underflows_is_none() -> None:
    teacher = torch.tensor([[0.0, -200.0]])  # exp(-200) is 0 in fp32
    student = torch.tensor([[0.0, -INF]], requires_grad=True)
    kl = forward_kl(student, teacher)
    (grad,) = torch.autograd.grad(kl.sum(), student)
    assert kl.item() == 0.0
    assert grad.tolist() == [[-1.0, 0.0]]


def test_gradient_is_the_cross_entropys_of_the_teacher() -> None:
    torch.manual_seed(3)
    student, teacher = torch.randn(2, 4, 7, dtype=torch.float64).log_softmax(-1)
    assert torch.autograd.gradcheck(lambda s: forward_kl(s, teacher), student.requires_grad_())


@pytest.mark.parametrize(
    ("dtype", "result"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_dtype(dtype: torch.dtype, result: torch.dtype) -> None:
    p = torch.zeros(2, 1, dtype=dtype)
    assert forward_kl(p, p).dtype == result
    assert forward_kl(p, p).shape == (2,)
