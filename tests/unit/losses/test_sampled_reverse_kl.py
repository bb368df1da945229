"""Reverse KL from sampled text, of a model of five ids and three tokens whose 125 texts are summed over, in float64."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdtune.errors import ConfigError, DataError, TrainingError
from kdtune.losses import (
    DenseSignal,
    HiddenSignal,
    KDLoss,
    ReverseKL,
    SampledReverseKL,
    SampledTargets,
    Targets,
    TextSignal,
    TopKSignal,
    TopKTargets,
    check_targets,
    signal_cross_entropy,
)
from kdtune.models import OutputHead
from kdtune.teachers.cache.signals import able_kinds
from kdtune.training.checks import divergence_problems

V, LENGTH, D = 5, 3, 4
TEXTS = torch.tensor(list(product(range(V), repeat=LENGTH)))
# The number of the text before each token, among all that are shorter than LENGTH.
PREFIXES = torch.stack(
    [torch.zeros(len(TEXTS), dtype=torch.int64), 1 + TEXTS[:, 0], 1 + V + V * TEXTS[:, 0] + TEXTS[:, 1]], 1
)


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Pair:
    """A student with hidden states for every beginning of a text, and a teacher's log-probabilities there."""

    def __init__(self) -> None:
        num = int(PREFIXES.max()) + 1
        self.hidden, self.weight = numbers(num, D, seed=0).requires_grad_(), nn.Parameter(numbers(V, D, seed=1))
        self.teacher_hidden, self.teacher_weight = numbers(num, 3, seed=2), numbers(V, 3, seed=3)

    @property
    def student(self) -> Tensor:
        return (self.hidden @ self.weight.T).log_softmax(-1)

    @property
    def teacher(self) -> Tensor:
        return (self.teacher_hidden @ self.teacher_weight.T).log_softmax(-1)

    @property
    def log_ratios(self) -> Tensor:
        """d of each token of each text."""
        return (self.student - self.teacher)[PREFIXES, TEXTS]

    @property
    def probabilities(self) -> Tensor:
        """Of each text, by the student."""
        return self.student.detach()[PREFIXES, TEXTS].sum(-1).exp()

    @property
    def signal(self) -> TextSignal:
        return TextSignal(self.teacher[PREFIXES, TEXTS], V)

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, (self.hidden, self.weight))

    def loss(self, kd_loss: Any, signal: Any, weights: Tensor | None = None, **settings: Any) -> tuple[Tensor, Any]:
        """Of all texts, each token with the weight of its text."""
        targets = Targets.from_labels(TEXTS)
        if weights is not None:
            targets = replace(targets, weights_N=weights.repeat_interleave(LENGTH))
        loss_fn = KDLoss(kd_loss, **{"kd_ratio": 1.0, **settings})
        return loss_fn(self.hidden[PREFIXES], OutputHead.of(self.weight), signal, targets)


@pytest.fixture
def pair() -> Pair:
    return Pair()


def check(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def kl(first: Tensor, second: Tensor) -> Tensor:
    return (first.exp() * (first - second)).sum(-1)


@pytest.mark.parametrize("estimator", ["k1", "k2"])
@pytest.mark.parametrize("chunk_size", [None, 7])
def test_over_all_texts_of_the_student_the_gradient_is_that_of_the_reverse_kl(
    pair: Pair, estimator: Any, chunk_size: int | None
) -> None:
    """Each text as often as the student writes it; a token's prefix is a constant, as in `ReverseKL`."""
    q = pair.probabilities
    # By the definition: what comes after a beginning, as often as the student begins so.
    expected = (q[:, None] * kl(pair.student, pair.teacher)[PREFIXES]).sum()
    loss, parts = pair.loss(SampledReverseKL(estimator), pair.signal, q, chunk_size=chunk_size)
    gradients = pair.gradients(loss)
    check(gradients, pair.gradients(expected))
    whole, _ = pair.loss(ReverseKL(), DenseSignal(pair.teacher[PREFIXES]), q)
    check(gradients, pair.gradients(whole))
    d = pair.log_ratios.detach()
    value = expected.detach() if estimator == "k1" else (q[:, None] * d.square() / 2).sum()
    check((loss.detach(), parts["kd_loss"]), (value, value))
    assert {*parts} == {"class_loss", "kd_loss"}


def test_why_other_estimators_are_refused(pair: Pair) -> None:
    """k3, differentiated, is the forward KL on the student's texts; k1, differentiated, is nothing."""
    q = pair.probabilities[:, None]
    d = pair.log_ratios
    forward = (q * kl(pair.teacher, pair.student)[PREFIXES]).sum()
    check(pair.gradients((q * ((-d).exp() - 1 + d)).sum()), pair.gradients(forward))
    check(pair.gradients((q * pair.log_ratios).sum()), tuple(map(torch.zeros_like, (pair.hidden, pair.weight))))
    with pytest.raises(
        ConfigError, match="estimator=k3: must be k2 or k1: differentiated, its mean is the gradient of the forward KL"
    ):
        SampledReverseKL("k3")


def test_any_teacher_that_knows_the_text_serves(pair: Pair) -> None:
    """One of hidden states, of all probabilities, or of the text alone; weights and cross entropy as in every loss."""
    weights = numbers(len(TEXTS), seed=4).abs()
    head = OutputHead.of(pair.teacher_weight)
    signals = [pair.signal, DenseSignal(pair.teacher[PREFIXES]), HiddenSignal(pair.teacher_hidden[PREFIXES], head)]
    ce = -(weights[:, None] * pair.student[PREFIXES, TEXTS]).sum()
    expected = 0.7 * ce + 0.3 * (weights[:, None] * pair.log_ratios.square() / 2).sum()
    gradients = pair.gradients(expected)
    for signal in signals:
        loss, parts = pair.loss(SampledReverseKL(), signal, weights, kd_ratio=0.3)
        check((loss, parts["class_loss"], *pair.gradients(loss)), (expected, ce.detach(), *gradients))
    assert pair.loss(SampledReverseKL(), None, kd_ratio=0.0)[1].keys() == {"class_loss"}
    of_teacher = signal_cross_entropy(pair.signal, Targets.from_labels(TEXTS))
    check((of_teacher,), (-pair.teacher[PREFIXES, TEXTS].sum(),))


def test_what_cannot_serve_is_refused(pair: Pair) -> None:
    few = TopKSignal(TEXTS[..., None], pair.signal.logp_BS[..., None], V, "tail")
    for signal, error, words in (
        (None, ConfigError, "a teacher is missing: kd_ratio is 1.0"),
        (few, ConfigError, "TopKRows lack most ids"),
        (TextSignal(pair.signal.logp_BS[1:], V), TrainingError, "do not belong to the labels"),
        (TextSignal(pair.signal.logp_BS, V - 1), DataError, "a label is not an id of the vocabulary: 4"),
    ):
        with pytest.raises(error, match=words):
            pair.loss(SampledReverseKL(), signal)
    for targets in (TopKTargets(3), TopKTargets(3, "renormalize"), SampledTargets(3)):
        with pytest.raises(ConfigError, match="it needs the probability of the text's own tokens"):
            check_targets(SampledReverseKL(), targets)
    assert able_kinds(SampledReverseKL()) == ["kind=hidden", "kind=path"]


def test_a_data_sets_text_is_refused_unless_that_is_wanted() -> None:
    node = {"_component_": "kdtune.losses.SampledReverseKL"}
    (problem,) = divergence_problems(node)
    assert "is the reverse KL on text that the student has sampled" in problem and "kd_loss.off_policy=true" in problem
    assert not divergence_problems(node | {"off_policy": True}) and not divergence_problems(node, is_own_text=True)
    assert SampledReverseKL("k1", off_policy=True).name == "sampled reverse KL (k1, off policy)"
