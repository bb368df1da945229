"""Five ids and texts of at most three tokens: what a regime learns in expectation, against sums over all texts in float64."""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeAlias

import numpy as np
import pytest
import torch
from torch import Tensor

from kdtune.data import collate
from kdtune.generation import Sampling, complete
from kdtune.losses import (
    BySource,
    ForwardKL,
    HiddenSignal,
    JensenShannon,
    KDLoss,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    TopKTargets,
    WeightedSum,
)
from kdtune.models import Transformer, llama
from kdtune.rollouts import PolicyGradient, Rollout

V, LENGTH, STOP, PROMPT = 5, 3, 4, [1, 2]
Compared: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def model(seed: int) -> Transformer:
    torch.manual_seed(seed)
    made: Transformer = llama(
        vocab_size=V, embed_dim=8, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_dim=16, max_seq_len=16
    )
    with torch.no_grad():
        made.output.weight.mul_(40)
    return made.double()


def texts() -> Iterator[tuple[int, ...]]:
    """Yield every answer: one that ends with the stop id, or three tokens without it."""
    for length in range(1, LENGTH + 1):
        for ids in itertools.product(range(V), repeat=length):
            is_ended = ids[-1] == STOP and STOP not in ids[:-1]
            if is_ended or (length == LENGTH and STOP not in ids):
                yield ids


def log_probs(one: Transformer, prefix: tuple[int, ...]) -> Tensor:
    """Return the log-probabilities [V] of the token after the prompt and a prefix of the answer."""
    return one(torch.tensor([[*PROMPT, *prefix]]))[0, -1].log_softmax(-1)


def text_probability(one: Transformer, ids: tuple[int, ...]) -> Tensor:
    logp = one(torch.tensor([[*PROMPT, *ids]]))[0, len(PROMPT) - 1 : -1].log_softmax(-1)
    return logp[range(len(ids)), ids].sum().exp()


def kl(p: Tensor, q: Tensor) -> Tensor:
    """Return KL(p || q) of log-probabilities [V]."""
    return (p.exp() * (p - q)).sum()


def over_prefixes(student: Transformer, teacher: Transformer, writer: Transformer, of_token: Compared) -> Tensor:
    """Return the sum of a function of both distributions over all prefixes, each by the writer's probability of it, a constant."""
    total = torch.zeros((), dtype=torch.float64)
    for prefix in {ids[:at] for ids in texts() for at in range(len(ids))}:
        probability = text_probability(writer, prefix).detach() if prefix else 1.0
        total = total + probability * of_token(log_probs(student, prefix), log_probs(teacher, prefix).detach())
    return total


def expected_loss(
    student: Transformer, teacher: Transformer, writer: Transformer, loss_fn: KDLoss, weight: float = 1.0
) -> Tensor:
    """Return the loss of every text as it is trained on, each by the writer's probability of it, a constant, times a weight."""
    every, is_own = list(texts()), writer is student
    source = "student" if is_own else "teacher"
    rollouts = [Rollout(np.array([*PROMPT, *ids]), len(PROMPT), ids[-1] == STOP, source, 0, 0) for ids in every]
    batch = collate([one.example() for one in rollouts], 0, padding_free=True)
    with torch.no_grad():
        probabilities = torch.stack([text_probability(writer, ids) for ids in every])
        signal = HiddenSignal(teacher(**batch.inputs, return_hidden=True), teacher.output)
    weights_N = weight * probabilities.repeat_interleave(torch.tensor([len(ids) for ids in every]))
    targets = replace(batch.targets, is_own_text=is_own, weights_N=weights_N)
    loss, _ = loss_fn(student(**batch.inputs, return_hidden=True), student.output, signal, targets)
    return loss


def assert_same_gradient(found: Tensor, wanted: Tensor, student: Transformer) -> None:
    assert found.item() == pytest.approx(wanted.item(), rel=1e-10)
    gradients = [torch.autograd.grad(one, list(student.parameters())) for one in (found, wanted)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def merged(logp: Tensor, ids: Tensor) -> Tensor:
    """Return the logarithms of some ids' probabilities, and of all others' together."""
    kept = logp.exp()[ids]
    return torch.cat([kept, 1 - kept.sum()[None]]).log()


REGIMES = {
    "reverse": (ReverseKL(), None, lambda s, t: kl(s, t)),
    "jsd": (JensenShannon(0.3), None, lambda s, t: JensenShannon(0.3)(s[None], t[None]).sum()),
    "skew": (SkewReverseKL(0.1), None, lambda s, t: kl(s, (0.9 * t.exp() + 0.1 * s.exp()).log())),
    "a share of forward KL": (WeightedSum([ReverseKL(), ForwardKL()], [0.8, 0.2]), None,
                              lambda s, t: 0.8 * kl(s, t) + 0.2 * kl(t, s)),
    "top-k with a tail": (ReverseKL(), TopKTargets(2), lambda s, t: kl(*(merged(one, t.topk(2).indices) for one in (s, t)))),
    "top-k alone": (ReverseKL(), TopKTargets(2, "ignore"),
                    lambda s, t: kl(*(one[t.topk(2).indices].log_softmax(0) for one in (s, t)))),
}  # fmt: skip


@pytest.mark.parametrize("name", REGIMES)
def test_the_expected_gradient_is_that_of_all_prefixes(name: str) -> None:
    """Each prefix counts by the student's probability of it, which is no part of the gradient."""
    student, teacher = model(0), model(1)
    divergence, teacher_targets, of_token = REGIMES[name]
    loss_fn = KDLoss(divergence, kd_ratio=1.0, teacher_targets=teacher_targets)
    found = expected_loss(student, teacher, student, loss_fn)
    assert_same_gradient(found, over_prefixes(student, teacher, student, of_token), student)


def test_pairs_are_two_divergences_each_on_its_own_writer_s_prefixes() -> None:
    """DistiLLM-2 in expectation: (2 - b) skew KL over the teacher's texts, b skew reverse KL over the student's."""
    student, teacher, b = model(0), model(1), 1.3
    loss_fn = KDLoss(BySource(SkewForwardKL(0.1), SkewReverseKL(0.1)), kd_ratio=1.0)
    found = expected_loss(student, teacher, teacher, loss_fn, 2 - b) + expected_loss(
        student, teacher, student, loss_fn, b
    )
    wanted = (2 - b) * over_prefixes(
        student, teacher, teacher, lambda s, t: kl(t, (0.1 * t.exp() + 0.9 * s.exp()).log())
    ) + b * over_prefixes(student, teacher, student, REGIMES["skew"][2])
    assert_same_gradient(found, wanted, student)


def test_texts_are_written_as_often_as_the_model_says() -> None:
    student = model(0)
    probabilities = {ids: text_probability(student, ids).item() for ids in texts()}
    assert sum(probabilities.values()) == pytest.approx(1.0)
    count = 3000
    found = complete(
        student, [PROMPT] * count, max_new_tokens=LENGTH, stop_ids={STOP}, sampling=Sampling(1.0), seeds=range(count),
        with_log_probs=True,
    )  # fmt: skip
    counts = dict.fromkeys(probabilities, 0)
    for one in found:
        counts[tuple(one.ids)] += 1
        assert one.is_finished == (one.ids[-1] == STOP)
        assert sum(one.log_probs) == pytest.approx(math.log(probabilities[tuple(one.ids)]), abs=1e-6)
    frequent = [ids for ids, p in probabilities.items() if p * count >= 5]
    rest = count - sum(counts[ids] for ids in frequent), count * (1 - sum(probabilities[ids] for ids in frequent))
    pairs = [(counts[ids], count * probabilities[ids]) for ids in frequent] + ([rest] if rest[1] > 0 else [])
    statistic, freedom = sum((seen - wanted) ** 2 / wanted for seen, wanted in pairs), len(pairs) - 1
    # A chi-squared variable has this mean and variance; five deviations above it is no chance.
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


def test_minillm_is_the_gradient_of_the_reverse_kl_of_whole_texts() -> None:
    """Single steps and policy gradient in expectation, without the paper's variance reductions, which are biased."""
    student, teacher = model(0), model(1)
    plain = PolicyGradient(gamma=1.0, reward_scale=1.0, reward_clip=None, normalizes_length=False, whitens=False)
    exact, total = torch.zeros(()), torch.zeros((), dtype=torch.float64)
    loss_fn = KDLoss(ReverseKL(), kd_ratio=0.5)
    for ids in texts():
        q, p = text_probability(student, ids), text_probability(teacher, ids).detach()
        exact = exact + q * (q / p).log()
        of_tokens = [
            np.array([log_probs(one, ids[:at])[token].item() for at, token in enumerate(ids)])
            for one in (student, teacher)
        ]
        tokens = np.array([*PROMPT, *ids])
        rollout = Rollout(tokens, len(PROMPT), ids[-1] == STOP, "student", 0, 0, None, *of_tokens)
        batch = collate([rollout.example()], 0, padding_free=True)
        (advantages,) = plain.advantages([rollout])
        targets = replace(batch.targets, class_weights_N=torch.from_numpy(advantages))
        with torch.no_grad():
            signal = HiddenSignal(teacher(**batch.inputs, return_hidden=True), teacher.output)
        loss, _ = loss_fn(student(**batch.inputs, return_hidden=True), student.output, signal, targets)
        total = total + q.detach() * 2 * loss  # both terms have the weight 1/2
    wanted = torch.autograd.grad(exact, list(student.parameters()))
    for found, exactly in zip(torch.autograd.grad(total, list(student.parameters())), wanted, strict=True):
        torch.testing.assert_close(found, exactly, rtol=1e-8, atol=1e-11)


def test_mixed_texts_are_drawn_from_both_models() -> None:
    student, teacher, share, count = model(0), model(1), 0.4, 3000
    found = complete(
        student, [PROMPT] * count, max_new_tokens=LENGTH, stop_ids={STOP}, sampling=Sampling(1.0), seeds=range(count),
        with_log_probs=True, partner=teacher, partner_share=share,
    )  # fmt: skip
    first = (1 - share) * log_probs(student, ()).exp() + share * log_probs(teacher, ()).exp()
    counts = torch.bincount(torch.tensor([one.ids[0] for one in found]), minlength=V)
    assert ((counts / count - first).abs() < 5 * (first * (1 - first) / count).sqrt()).all()
    for one in found[:50]:
        for at, token in enumerate(one.ids):
            prefix = tuple(one.ids[:at])
            assert one.log_probs[at] == pytest.approx(log_probs(student, prefix)[token].item(), abs=1e-9)
            assert one.partner_log_probs[at] == pytest.approx(log_probs(teacher, prefix)[token].item(), abs=1e-9)
            hidden = teacher(torch.tensor([[*PROMPT, *prefix]]), return_hidden=True)[0, -1]
            torch.testing.assert_close(one.partner_hidden[at], hidden)
