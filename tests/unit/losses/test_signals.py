"""What a teacher may give, a divergence's settings, and targets found once: each against float64 by the definitions."""

import pytest
import torch
from torch import Tensor, nn

from kdtune.constants import IGNORE_INDEX
from kdtune.errors import ConfigError, DataError, TrainingError
from kdtune.losses import (
    DenseSignal,
    ForwardKL,
    ForwardKLLoss,
    HiddenSignal,
    KDLoss,
    Signal,
    Targets,
    TopKSignal,
    check_divergence,
    divergence_name,
    signal_cross_entropy,
)

V = 11


def pair(teacher_vocab: int = V) -> tuple[Tensor, nn.Linear, HiddenSignal, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 6, 5, generator=generator, dtype=torch.float64).requires_grad_()
    student, teacher = (nn.Linear(5, rows, bias=False).double() for rows in (V, teacher_vocab))
    for head in (student, teacher):
        with torch.no_grad():
            head.weight.normal_(generator=generator)
    labels = torch.randint(min(V, teacher_vocab), (2, 6), generator=generator)
    labels[0, :2] = labels[1, 4:] = IGNORE_INDEX
    return (
        hidden,
        student,
        HiddenSignal(torch.randn(2, 6, 5, generator=generator, dtype=torch.float64), teacher),
        labels,
    )


def values_and_gradient(
    signal: Signal, kd_loss: KDLoss, case: tuple[Tensor, nn.Linear, HiddenSignal, Tensor]
) -> list[Tensor]:
    hidden, head, _, labels = case
    loss, parts = kd_loss(hidden, head, signal, Targets.from_labels(labels))
    return [loss.detach(), *parts.values(), *torch.autograd.grad(loss, (hidden, head.weight))]


@pytest.mark.parametrize("teacher_vocab", [V, V - 3, V + 4])
@pytest.mark.parametrize("chunk_size", [1, 3, None])
def test_hidden_states_logits_and_all_ids_as_top_k_are_one_distribution(
    teacher_vocab: int, chunk_size: int | None
) -> None:
    case = pair(teacher_vocab)
    hidden_signal, kd_loss = case[2], KDLoss(kd_ratio=0.7, chunk_size=chunk_size)
    logits_BSV = hidden_signal.output(hidden_signal.hidden_BSD).detach()
    order = logits_BSV.argsort(-1, descending=True)
    others = [DenseSignal(logits_BSV), TopKSignal(order, logits_BSV.gather(-1, order), teacher_vocab)]
    expected = values_and_gradient(hidden_signal, kd_loss, case)
    for signal in others:
        assert isinstance(signal, Signal)
        assert signal.vocab_size == hidden_signal.vocab_size == teacher_vocab
        for found, wanted in zip(values_and_gradient(signal, kd_loss, case), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)
    for signal in (hidden_signal, *others):
        logp = signal.log_probs(torch.tensor([0, 7]))
        torch.testing.assert_close(logp, logits_BSV.flatten(0, 1)[[0, 7]].log_softmax(-1), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("chunk_size", [1, 3, None])
def test_cross_entropy_of_a_teacher_is_torchs(chunk_size: int | None) -> None:
    _, _, hidden_signal, labels = pair(V + 4)
    logits_BSV = hidden_signal.output(hidden_signal.hidden_BSD).detach()
    expected = torch.nn.functional.cross_entropy(logits_BSV.flatten(0, 1), labels.flatten(), reduction="sum")
    for signal in (hidden_signal, DenseSignal(logits_BSV)):
        found = signal_cross_entropy(signal, Targets.from_labels(labels), chunk_size)
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


def test_top_k_is_the_forward_kl_to_the_renormalized_ids() -> None:
    hidden, head, teacher, labels = pair()
    logits_BSV = teacher.output(teacher.hidden_BSD).detach()
    top = logits_BSV.log_softmax(-1).topk(3)
    _, parts = KDLoss(kd_ratio=1.0, chunk_size=2)(hidden, head, TopKSignal(top.indices, top.values, V), labels)
    expected = 0.0
    for row, column in (labels != IGNORE_INDEX).nonzero().tolist():
        q = (hidden[row, column] @ head.weight.T).exp()
        q /= q.sum()
        p = logits_BSV[row, column, top.indices[row, column]].exp()
        p /= p.sum()
        expected += float((p * (p / q[top.indices[row, column]]).log()).sum())
    assert parts["kd_loss"].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 2.0, 7.0])
def test_temperature_is_that_of_the_logits(temperature: float) -> None:
    hidden, head, teacher, labels = pair()
    valid = labels != IGNORE_INDEX
    student_logits, teacher_logits = hidden @ head.weight.T, teacher.output(teacher.hidden_BSD).detach()
    q, p = ((logits[valid] / temperature).softmax(-1) for logits in (student_logits, teacher_logits))
    expected = (p * (p / q).log()).sum()
    loss, _ = KDLoss(ForwardKL(temperature), kd_ratio=1.0, chunk_size=4)(hidden, head, teacher, labels)
    torch.testing.assert_close(loss, expected)
    for found, wanted in zip(
        *(torch.autograd.grad(one, (hidden, head.weight)) for one in (loss, expected)), strict=True
    ):
        torch.testing.assert_close(found, wanted)
    plain = ForwardKLLoss(temperature)(student_logits, teacher_logits, labels)
    torch.testing.assert_close(plain, expected.detach() / valid.sum(), check_dtype=False)


def test_a_divergence_is_an_object_that_is_called_or_has_one() -> None:
    assert [divergence_name(one) for one in (ForwardKL(), ForwardKLLoss(), ForwardKL(2.0))] == ["KL", "KL", "KL (T=2)"]
    for good in (ForwardKL(2.0), ForwardKLLoss(2.0), lambda s, t: (t.exp() * (t - s)).sum(-1)):
        check_divergence(good)
    for temperature in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="temperature="):
            ForwardKL(temperature)
    with pytest.raises(ConfigError, match="kd_loss: .*object has no divergence; allowed is a function"):
        check_divergence(object())


def test_targets_are_the_labelled_positions() -> None:
    labels = torch.tensor([[IGNORE_INDEX, 3, 0], [7, IGNORE_INDEX, IGNORE_INDEX]])
    targets = Targets.from_labels(labels)
    assert (targets.positions_N.tolist(), targets.labels_N.tolist()) == ([1, 2, 3], [3, 0, 7])
    assert (len(targets), targets.shape, targets.id_range) == (3, (2, 3), (0, 7))
    assert torch.equal(targets.to_labels(), labels)
    nothing = Targets.from_labels(torch.full((1, 2), IGNORE_INDEX))
    assert (len(nothing), nothing.id_range) == (0, (0, -1))


@pytest.mark.parametrize("label", [V, -1, V - 1])
def test_a_target_beyond_the_smaller_vocabulary_is_named(label: int) -> None:
    hidden, head, teacher, labels = pair(V - 3)
    labels[1, 1] = label
    with pytest.raises(DataError, match=rf"not an id of the vocabulary: {label}; allowed are 0 to {V - 4},"):
        KDLoss()(hidden, head, teacher, Targets.from_labels(labels))


def test_a_signal_of_other_positions_is_refused() -> None:
    hidden, head, _, labels = pair()
    with pytest.raises(
        TrainingError, match=r"teacher's log-probabilities .* positions \(2, 5\) for labels of \(2, 6\)"
    ):
        KDLoss()(hidden, head, DenseSignal(torch.zeros(2, 5, V)), labels)
