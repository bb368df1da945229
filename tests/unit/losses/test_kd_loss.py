"""The plain-logit losses, and what KDLoss accepts and refuses."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdtune.constants import IGNORE_INDEX
from kdtune.errors import ConfigError, DataError, TrainingError
from kdtune.losses import CrossEntropyLoss, ForwardKL, ForwardKLLoss, HiddenSignal, KDLoss, check_head, forward_kl


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits, teacher_logits = torch.randn(2, 3, 5, 7, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(7, (3, 5), generator=generator)
    labels[0, :2] = labels[2] = IGNORE_INDEX
    return logits, teacher_logits, labels


def loops(logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean cross entropy and forward KL over the valid tokens, in Python floats."""
    ce, kl = [], []
    for s, t, label in zip(logits.flatten(0, 1), teacher_logits.flatten(0, 1), labels.flatten(), strict=True):
        if label == IGNORE_INDEX:
            continue
        q, p = ([math.exp(x) / sum(map(math.exp, row.tolist())) for x in row.tolist()] for row in (s, t))
        ce.append(-math.log(q[int(label)]))
        kl.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    return sum(ce) / len(ce), sum(kl) / len(kl)


@pytest.mark.parametrize("flat", [False, True])
def test_means_over_valid_tokens(flat: bool) -> None:
    logits, teacher_logits, labels = batch()
    ce, kl = loops(logits, teacher_logits, labels)
    if flat:
        logits, teacher_logits, labels = logits.flatten(0, 1), teacher_logits.flatten(0, 1), labels.flatten()
    assert CrossEntropyLoss()(logits, labels).item() == pytest.approx(ce, rel=1e-12)
    assert ForwardKLLoss()(logits, teacher_logits, labels).item() == pytest.approx(kl, rel=1e-12)


def test_labels_that_torch_ignores_are_ignored() -> None:
    logits, _, labels = batch()
    labels[labels == IGNORE_INDEX] = nn.CrossEntropyLoss().ignore_index
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(CrossEntropyLoss()(logits, labels), expected)


def test_six_lines_of_the_case_study() -> None:
    logits, teacher_logits, labels = batch(torch.float32)
    logits.requires_grad_()
    ce_loss = CrossEntropyLoss()
    kd_loss = ForwardKLLoss()
    loss = ce_loss(logits, labels) + kd_loss(logits, teacher_logits, labels)
    loss.backward()
    assert logits.grad is not None
    valid = labels != IGNORE_INDEX
    q, p = logits.detach().softmax(-1), teacher_logits.softmax(-1)
    expected = (2 * q - p - F.one_hot(labels.clamp(min=0), 7)) * valid[..., None] / valid.sum()
    torch.testing.assert_close(logits.grad, expected)


def test_softmax_is_in_fp32() -> None:
    logits, teacher_logits, labels = batch(torch.bfloat16)
    ce, kl = loops(logits, teacher_logits, labels)
    assert CrossEntropyLoss()(logits, labels).item() == pytest.approx(ce, rel=1e-5)
    assert ForwardKLLoss()(logits, teacher_logits, labels).item() == pytest.approx(kl, rel=1e-5)


def test_nothing_valid_is_zero_with_a_graph() -> None:
    logits, teacher_logits, labels = batch()
    labels = torch.full_like(labels, IGNORE_INDEX)
    logits.requires_grad_()
    loss = CrossEntropyLoss()(logits, labels) + ForwardKLLoss()(logits, teacher_logits, labels)
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None and not logits.grad.any()


@pytest.mark.parametrize(("student_rows", "teacher_rows"), [(7, 5), (5, 7)])
def test_a_teacher_gives_no_probability_to_ids_that_one_of_the_two_lacks(student_rows: int, teacher_rows: int) -> None:
    logits, teacher_logits, labels = batch()
    labels = labels.clamp(max=4)
    logits, teacher_logits = logits[..., :student_rows], teacher_logits[..., :teacher_rows]
    teacher_of_student = torch.full_like(logits, -1e4)  # a probability of 0 in float64
    teacher_of_student[..., :5] = teacher_logits[..., :5]
    kl = []
    for s, t, label in zip(logits.flatten(0, 1), teacher_of_student.flatten(0, 1), labels.flatten(), strict=True):
        if label != IGNORE_INDEX:
            q, p = ([math.exp(x) / sum(map(math.exp, row.tolist())) for x in row.tolist()] for row in (s, t))
            kl.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a))
    assert ForwardKLLoss()(logits, teacher_logits, labels).item() == pytest.approx(sum(kl) / len(kl), rel=1e-12)


def test_no_gradient_reaches_the_teacher() -> None:
    logits, teacher_logits, labels = batch()
    teacher_logits.requires_grad_()
    ForwardKLLoss()(logits.requires_grad_(), teacher_logits, labels).backward()
    assert teacher_logits.grad is None


def test_divergence_is_public() -> None:
    student, teacher = torch.randn(2, 3, 7).log_softmax(-1)
    for divergence in (ForwardKL(), ForwardKLLoss().divergence):
        assert torch.equal(divergence(student, teacher), forward_kl(student, teacher))


@pytest.mark.parametrize("label", [7, -1])
def test_a_label_outside_the_vocabulary_is_named(label: int) -> None:
    logits, teacher_logits, labels = batch()
    labels[1, 2] = label
    for call in (
        lambda: CrossEntropyLoss()(logits, labels),
        lambda: ForwardKLLoss()(logits, teacher_logits, labels),
        lambda: KDLoss(kd_ratio=0)(torch.zeros(3, 5, 4), linear(4, 7), None, labels),
    ):
        with pytest.raises(DataError, match=f"vocabulary: {label}; allowed are 0 to 6"):
            call()


def test_a_label_the_teacher_does_not_have_is_refused() -> None:
    _, _, labels = batch()
    labels[1, 2] = 6
    signal = HiddenSignal(torch.zeros(3, 5, 4), linear(4, 6))
    with pytest.raises(DataError, match="vocabulary: 6; allowed are 0 to 5"):
        KDLoss()(torch.zeros(3, 5, 4), linear(4, 7), signal, labels)


def test_other_shapes_are_refused() -> None:
    logits, teacher_logits, labels = batch()
    signal = HiddenSignal(torch.zeros(3, 4, 4), linear(4, 7))
    for call in (
        lambda: CrossEntropyLoss()(logits[:, 1:], labels),
        lambda: ForwardKLLoss()(logits, teacher_logits[:, 1:], labels),
        lambda: KDLoss()(torch.zeros(3, 5, 4), linear(4, 7), signal, labels),
    ):
        with pytest.raises(TrainingError, match=r"positions \(3, 4\) for labels of \(3, 5\)"):
            call()


@pytest.mark.parametrize("kd_ratio", [-0.1, 1.1, math.nan])
def test_kd_ratio_is_checked(kd_ratio: float) -> None:
    with pytest.raises(ConfigError, match="kd_ratio"):
        KDLoss(kd_ratio=kd_ratio)


def test_chunk_size_is_checked() -> None:
    with pytest.raises(ConfigError, match="chunk_size"):
        KDLoss(chunk_size=0)


def test_a_missing_teacher_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"kd_ratio is 0\.5"):
        KDLoss()(torch.zeros(3, 5, 4), linear(4, 7), None, batch()[2])


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


class Adapted(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class Quantized(Tensor):
    pass


def with_quantized_weight() -> nn.Linear:
    head = linear(4, 7)
    head.weight = nn.Parameter(torch.zeros(7, 4).as_subclass(Quantized))
    return head


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (nn.Linear(4, 7), "a Linear with a bias"),
        (Adapted(4, 7, bias=False), "a Adapted"),
        (nn.Sequential(linear(4, 7)), "a Sequential"),
        (with_quantized_weight(), "a Linear whose weight is a Quantized"),
    ],
)
def test_heads_that_are_more_than_a_matrix_are_refused_by_name(head: nn.Module, name: str) -> None:
    hidden, labels = torch.zeros(3, 5, 4), batch()[2]
    with pytest.raises(ConfigError, match=f"student's output head .* it is {name};"):
        KDLoss(kd_ratio=0)(hidden, head, None, labels)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"teacher's output head .* it is {name};"):
        KDLoss()(hidden, linear(4, 7), HiddenSignal(hidden, head), labels)  # type: ignore[arg-type]


def test_a_head_is_checked_before_the_first_batch() -> None:
    check_head("teacher", linear(4, 7))
    with pytest.raises(ConfigError, match="teacher's output head .* it is a Linear with a bias;"):
        check_head("teacher", nn.Linear(4, 7))
