"""Cross-tokenizer losses against brute force in float64, which aligns and compares by hand."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdtune.errors import ConfigError
from kdtune.losses import (
    ALM,
    ULD,
    DenseSignal,
    ForwardKL,
    HiddenSignal,
    HybridULD,
    JensenShannon,
    KDLoss,
    ReverseKL,
    Targets,
    TextSignal,
    align,
    token_log_probs,
    value_and_gradient,
)
from kdtune.losses.cross_tokenizer import debiased, sorted_distance
from kdtune.losses.heads import Projection
from kdtune.losses.token_log_probs import set_log_probs
from kdtune.teachers.cache.signals import kind_problem

V, W, D = 7, 11, 5


def rows(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def brute_uld(q: Tensor, p: Tensor) -> float:
    a, b = sorted(q.tolist(), reverse=True), sorted(p.tolist(), reverse=True)
    width = max(len(a), len(b))
    a, b = a + [0.0] * (width - len(a)), b + [0.0] * (width - len(b))
    return sum(abs(x - y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("sizes", [(V, W), (W, V), (V, V)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uld_is_the_distance_of_sorted_probabilities(sizes: tuple[int, int], dtype: torch.dtype) -> None:
    q, p = (rows(4, size, seed=i, dtype=dtype).softmax(-1) for i, size in enumerate(sizes))
    values, slope = sorted_distance(q, p)
    expected = torch.tensor([brute_uld(a, b) for a, b in zip(q, p, strict=True)])
    torch.testing.assert_close(values.double(), expected.double(), rtol=1e-5, atol=1e-6)
    q, p = q.double(), p.double()
    step = 1e-7
    for row, column in ((0, 0), (1, 3), (3, 6)):
        moved = q.clone()
        moved[row, column] += step
        difference = (brute_uld(moved[row], p[row]) - brute_uld(q[row], p[row])) / step
        assert math.isclose(difference, float(slope[row, column]), abs_tol=1e-2)


def shared() -> tuple[list[int], list[int]]:
    return [0, 2, 5, 6], [9, 1, 0, 4]


def brute_hybrid(s: Tensor, t: Tensor, reverse: bool = False) -> Tensor:
    """Forward KL of the distributions with all ids that are not shared merged, plus ULD of those."""
    ours, theirs = shared()
    total = s.new_zeros(())
    q, p = s.exp(), t.exp()
    pairs = [(q[i], p[j]) for i, j in zip(ours, theirs, strict=True)]
    pairs.append((1 - sum(a for a, _ in pairs), 1 - sum(b for _, b in pairs)))
    for a, b in pairs:
        total = total + (a * (a / b).log() if reverse else b * (b / a).log())
    rest_q = q[[i for i in range(V) if i not in ours]].sort(descending=True).values
    rest_p = p[[i for i in range(W) if i not in theirs]].sort(descending=True).values
    rest_q = torch.cat([rest_q, rest_q.new_zeros(len(rest_p) - len(rest_q))])
    return total + (rest_q - rest_p).abs().sum()


@pytest.mark.parametrize("exact", [ForwardKL(), ReverseKL()])
def test_the_hybrid_merges_the_ids_that_only_one_model_has(exact: Any) -> None:
    loss = HybridULD(exact).over(*shared(), (V, W))
    logits, t = rows(3, V, seed=1).requires_grad_(), rows(3, W, seed=2).log_softmax(-1)
    s = logits.log_softmax(-1)
    reverse = isinstance(exact, ReverseKL)
    expected = torch.stack([brute_hybrid(a, b, reverse) for a, b in zip(s, t, strict=True)])
    torch.testing.assert_close(loss(s, t), expected)
    (grad,) = torch.autograd.grad(expected.sum(), logits, retain_graph=True)
    values, slope = loss.value_and_gradient(s.detach(), t)
    torch.testing.assert_close(values, expected.detach())
    torch.testing.assert_close(slope - s.detach().exp() * slope.sum(-1, keepdim=True), grad)
    assert (values >= 0).all()


def test_the_hybrid_without_other_vocabulary_is_the_exact_divergence_to_the_bit() -> None:
    s, t = (rows(5, V, seed=i, dtype=torch.float32).log_softmax(-1) for i in (3, 4))
    for exact in (ForwardKL(), ReverseKL()):
        for found, own in zip(HybridULD(exact).value_and_gradient(s, t), exact.value_and_gradient(s, t), strict=True):
            assert torch.equal(found, own)


def test_alm_is_the_kl_between_two_coins() -> None:
    s = torch.tensor([-0.1, -30.0, -2.0, -1e-12], dtype=torch.float64, requires_grad=True)
    t = torch.tensor([-0.2, -3.0, -2.0, -5.0], dtype=torch.float64)
    x, y = (s / 100).exp(), (t / 100).exp()
    expected = y * (y / x).log() + (1 - y) * ((1 - y) / (1 - x)).log()
    found = ALM()(s, t)
    torch.testing.assert_close(found[:3], expected[:3], rtol=1e-9, atol=1e-15)
    assert found[2] == 0 and found.isfinite().all()
    (grad,) = torch.autograd.grad(found[:3].sum(), s, retain_graph=True)
    (by_hand,) = torch.autograd.grad(expected[:3].sum(), s)
    torch.testing.assert_close(grad, by_hand, rtol=1e-8, atol=1e-14)
    assert ALM()(torch.zeros(1), torch.zeros(1)).isfinite().all()
    torch.testing.assert_close(ALM(scale_by_temperature=True)(s, t), 100 * found)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_token_log_probs(softcap: float | None, chunk_size: int | None) -> None:
    hidden, weight = rows(6, D, seed=5).requires_grad_(), rows(V, D, seed=6).requires_grad_()
    positions, labels = torch.tensor([4, 0, 3, 1, 5]), torch.tensor([6, 0, 2, 2, 1])
    factors = rows(5, seed=7)
    found = token_log_probs(Projection(hidden, weight, softcap=softcap), positions, labels, chunk_size)
    logits = hidden[positions] @ weight.T
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    expected = logits.log_softmax(-1).gather(1, labels[:, None]).squeeze(1)
    torch.testing.assert_close(found, expected)
    ours = torch.autograd.grad((found * factors).sum(), (hidden, weight))
    theirs = torch.autograd.grad((expected * factors).sum(), (hidden, weight))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_set_log_probs(softcap: float | None, chunk_size: int | None) -> None:
    hidden, weight = rows(6, D, seed=5).requires_grad_(), rows(V, D, seed=6).requires_grad_()
    positions, ids, factors = torch.tensor([4, 0, 3, 1, 5]), [6, 0, 3], rows(5, seed=7)
    find = lambda h, w: set_log_probs(Projection(h, w, softcap=softcap), positions, torch.tensor(ids), chunk_size)  # noqa: E731
    logits = hidden[positions] @ weight.T
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    expected = logits.softmax(-1)[:, ids].sum(-1).log()
    found = find(hidden, weight)
    torch.testing.assert_close(found, expected)
    ours = torch.autograd.grad((found * factors).sum(), (hidden, weight))
    theirs = torch.autograd.grad((expected * factors).sum(), (hidden, weight))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.autograd.gradcheck(find, (hidden, weight))


# Two rows; the student has 5 positions and the teacher 4. Chunks: first and last boundary of both, and whether exact.
LABELS = torch.tensor([[-100, 3, 1, 2, -100], [-100, -100, 4, 6, -100]])
CHUNKS = torch.tensor([[1, 2, 0, 2, 1], [2, 4, 2, 3, 1], [7, 8, 5, 6, 0], [8, 9, 6, 7, 1]])
TEACHER_TOKENS = torch.tensor([[0, 8, 3, 10], [1, 2, 9, 4]])


def pair(dtype: torch.dtype = torch.float64) -> tuple[Tensor, nn.Linear, HiddenSignal]:
    hidden = rows(2, 5, D, seed=11, dtype=dtype).requires_grad_()
    output, teacher = (nn.Linear(width, size, bias=False, dtype=dtype) for width, size in ((D, V), (D + 1, W)))
    with torch.no_grad():
        output.weight.copy_(rows(V, D, seed=12))
        teacher.weight.copy_(rows(W, D + 1, seed=13))
    return hidden, output, HiddenSignal(rows(2, 4, D + 1, seed=14, dtype=dtype), teacher)


def by_hand(name: str, hidden: Tensor, output: nn.Linear, signal: HiddenSignal) -> tuple[Tensor, Tensor]:
    """Cross entropy and the divergence over the chunks, one at a time."""
    s = (hidden @ output.weight.T).log_softmax(-1).flatten(0, 1)
    t = (signal.hidden_BSD @ signal.output.weight.T).log_softmax(-1).flatten(0, 1)
    labels, tokens = LABELS.flatten(), TEACHER_TOKENS.flatten()
    ce = -sum(s[i, labels[i]] for i in range(10) if labels[i] >= 0)
    kd = s.new_zeros(())
    for first, last, their_first, their_last, exact in CHUNKS.tolist():
        if name == "alm":
            ours = sum(s[i, labels[i]] for i in range(first, last))
            theirs = sum(t[j, tokens[j + 1]] for j in range(their_first, their_last))
            x, y = (ours / 100).exp(), (theirs / 100).exp()
            kd = kd + y * (y / x).log() + (1 - y) * ((1 - y) / (1 - x)).log()
        elif name == "uld" or not exact:
            q, p = (one.exp().sort(descending=True).values for one in (s[first], t[their_first]))
            q = torch.cat([q, q.new_zeros(W - V)])
            kd = kd + (last - first) * (q - p).abs().sum()
        else:
            kd = kd + (last - first) * brute_hybrid(s[first], t[their_first])
    return ce, kd


LOSSES: dict[str, Any] = {"uld": ULD(), "hybrid": HybridULD().over(*shared(), (V, W)), "alm": ALM()}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("kd_ratio", "chunk_size"), [(0.0, None), (0.3, None), (0.05, 2), (1.0, 1)])
def test_the_loss_of_a_batch_is_the_one_computed_by_hand(name: str, kd_ratio: float, chunk_size: int | None) -> None:
    hidden, output, signal = pair()
    targets = align(Targets.from_labels(LABELS), CHUNKS, TEACHER_TOKENS)
    loss = KDLoss(LOSSES[name], kd_ratio=kd_ratio, chunk_size=chunk_size)
    total, parts = loss(hidden, output, signal, targets)
    ce, kd = by_hand(name, hidden, output, signal)
    expected = (1 - kd_ratio) * ce + kd_ratio * kd
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(parts["class_loss"], ce.detach())
    if kd_ratio:
        torch.testing.assert_close(parts["kd_loss"], kd.detach())
    inputs = (hidden, output.weight)
    for a, b in zip(torch.autograd.grad(total, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", LOSSES)
def test_a_one_token_answer_trains_the_position_before_it(name: str) -> None:
    """The shifted form: the gradient reaches the position that predicts the answer, and no other."""
    hidden, output, signal = pair()
    labels = torch.full((2, 5), -100)
    labels[0, 2] = 4
    targets = align(Targets.from_labels(labels), torch.tensor([[2, 3, 1, 2, 1]]), TEACHER_TOKENS)
    total, _ = KDLoss(LOSSES[name], kd_ratio=1.0)(hidden, output, signal, targets)
    (grad,) = torch.autograd.grad(total, hidden)
    assert [tuple(one) for one in grad.abs().sum(-1).nonzero().tolist()] == [(0, 2)]
    s = (hidden[0, 2] @ output.weight.T).log_softmax(-1)
    t = (signal.hidden_BSD[0, 1] @ signal.output.weight.T).log_softmax(-1)
    if name == "uld":
        q = torch.cat([s.exp().sort(descending=True).values, s.new_zeros(W - V)])
        expected = (q - t.exp().sort(descending=True).values).abs().sum()
    elif name == "hybrid":
        expected = brute_hybrid(s, t)
    else:
        expected = ALM()(s[4], t[TEACHER_TOKENS[0, 2]])
    torch.testing.assert_close(total, expected)


def test_a_batch_without_a_chunk_trains_the_cross_entropy_alone() -> None:
    hidden, output, signal = pair()
    for name, one in LOSSES.items():
        targets = align(Targets.from_labels(LABELS), torch.zeros((0, 5), dtype=torch.int64), TEACHER_TOKENS)
        total, parts = KDLoss(one, kd_ratio=0.5)(hidden, output, signal, targets)
        assert float(parts["kd_loss"]) == 0, name
        torch.testing.assert_close(total, 0.5 * by_hand("uld", hidden, output, signal)[0])


def test_a_divergence_over_the_same_ids_is_refused_for_a_teacher_with_its_own() -> None:
    hidden, output, signal = pair()
    targets = align(Targets.from_labels(LABELS), CHUNKS, TEACHER_TOKENS)
    with pytest.raises(ConfigError, match="ForwardKL compares distributions over the same ids.*HybridULD"):
        KDLoss(ForwardKL())(hidden, output, signal, targets)


def test_a_vocabulary_that_is_part_of_the_other_needs_a_divergence_that_is_finite_there() -> None:
    """The student's rest has no probability where all of its ids are shared, the teacher's where all of the teacher's are."""
    for exact, sizes, is_allowed in (
        (ForwardKL(), (4, 6), False), (ReverseKL(), (4, 6), True), (ForwardKL(), (6, 4), True), (ReverseKL(), (6, 4), False),
        (JensenShannon(), (4, 6), True), (JensenShannon(), (6, 4), True),
    ):  # fmt: skip
        loss = HybridULD(exact)
        if not is_allowed:
            with pytest.raises(ConfigError, match="vocabulary is part of the"):
                loss.over(range(4), range(4), sizes)
            continue
        bound = loss.over(range(4), range(4), sizes)
        s, t = (torch.randn(3, size, generator=torch.Generator().manual_seed(size)).log_softmax(-1) for size in sizes)
        values, gradient = value_and_gradient(bound, s, t)
        assert values.isfinite().all() and gradient.isfinite().all()


# Ids that begin a word, the special ones among them.
STARTS = ([0, 2, 6], [1, 4, 9], [6])


def joined_by_hand(
    chunks: list[list[int]], s: Tensor, t: Tensor, labels: Tensor, tokens: Tensor, threshold: float
) -> tuple[Tensor, int]:
    """The paper's loss, one text after the other: join chunks until the teacher may well begin a word; and the number of outcomes."""
    ours, theirs, special = STARTS
    total, open_, count = s.new_zeros(()), (s.new_zeros(()), s.new_zeros(())), 0
    for i, (first, last, their_first, their_last, _) in enumerate(chunks):
        open_ = (
            open_[0] + sum(s[j, labels[j]] for j in range(first, last)),
            open_[1] + sum(t[j, tokens[j + 1]] for j in range(their_first, their_last)),
        )
        is_special = int(labels[last - 1]) in special
        goes_on = i + 1 < len(chunks) and chunks[i + 1][0] == last and chunks[i + 1][2] == their_last
        boundary = t[their_last].exp()[theirs].sum() if goes_on else 0.0
        if not is_special and boundary > threshold:
            open_ = (open_[0] + s[last].exp()[ours].sum().log(), open_[1] + t[their_last].exp()[theirs].sum().log())
        if is_special or boundary > threshold:
            x, y = ((one / 100).exp() for one in open_)
            total, count = total + y * (y / x).log() + (1 - y) * ((1 - y) / (1 - x)).log(), count + 1
        if is_special or boundary > threshold or not goes_on:
            open_ = (s.new_zeros(()), s.new_zeros(()))
    return total, count


@pytest.mark.parametrize(("threshold", "num_outcomes"), [(0.0, 3), (0.05, 2), (0.99, 1)])
@pytest.mark.parametrize("signal_kind", ["hidden", "dense"])
def test_debiased_alm_is_the_one_computed_by_hand(threshold: float, num_outcomes: int, signal_kind: str) -> None:
    """The second chunk ends a text without a special token: nothing says what follows it, and it is left out."""
    hidden, output, signal = pair()
    targets = align(Targets.from_labels(LABELS), CHUNKS.flip(0), TEACHER_TOKENS)
    s = (hidden @ output.weight.T).log_softmax(-1).flatten(0, 1)
    t = (signal.hidden_BSD @ signal.output.weight.T).log_softmax(-1).detach()
    expected, count = joined_by_hand(
        CHUNKS.tolist(), s, t.flatten(0, 1), LABELS.flatten(), TEACHER_TOKENS.flatten(), threshold
    )
    assert count == num_outcomes
    alm = ALM(debias_threshold=threshold).with_word_starts(*STARTS)
    own: Any = signal if signal_kind == "hidden" else DenseSignal(t)
    total, parts = KDLoss(alm, kd_ratio=1.0, chunk_size=3)(hidden, output, own, targets)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(parts["kd_loss"], expected.detach())
    inputs = (hidden, output.weight)
    for a, b in zip(torch.autograd.grad(total, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_debiasing_makes_a_subword_and_a_byte_model_of_one_distribution_agree() -> None:
    """The paper's example: texts "ab " and "a " of a model that has the token "ab", and the same texts of a model of bytes."""
    p = {"ab ": 0.7, "a ": 0.3}
    # After "a", the subword model ends the word for sure, for "ab" would have been another token; the byte model need not.
    subword_a, end_of_subword_a = math.log(p["a "]), 0.0
    byte_a, end_of_byte_a = 0.0, math.log(p["a "])
    pair_of = lambda a, b: (torch.tensor([a, 0.0]), torch.tensor([b, 0.0]))  # noqa: E731
    meets, special = torch.tensor([True, False]), torch.tensor([False, False])
    texts, starts = (
        pair_of(byte_a, subword_a),
        (torch.tensor([0.0, end_of_byte_a]), torch.tensor([0.0, end_of_subword_a])),
    )
    alm = ALM(temperature=1.0, debias_threshold=0.1)
    assert alm(texts[0][:1], texts[1][:1]) > 0.5
    torch.testing.assert_close(debiased(alm, texts, starts, meets, special), torch.tensor(0.0), atol=1e-6, rtol=0)


def test_debiasing_needs_every_probability_and_the_ids_that_begin_a_word() -> None:
    hidden, output, signal = pair()
    targets = align(Targets.from_labels(LABELS), CHUNKS, TEACHER_TOKENS)
    alm = ALM(debias_threshold=0.1)
    with pytest.raises(ConfigError, match="with_word_starts"):
        KDLoss(alm)(hidden, output, signal, targets)
    text = TextSignal(torch.zeros(2, 4), W)
    with pytest.raises(ConfigError, match="text alone: this loss needs every probability"):
        KDLoss(alm.with_word_starts(*STARTS))(hidden, output, text, targets)
    with pytest.raises(ConfigError, match="debias_threshold=1"):
        ALM(debias_threshold=1.0)
    assert kind_problem("path", alm) and kind_problem("path", ALM()) is None and kind_problem("hidden", alm) is None


def test_a_text_without_probability_has_its_limit_in_alm() -> None:
    found = ALM(temperature=1.0)(torch.tensor([-1.0]), torch.tensor([-math.inf]))
    torch.testing.assert_close(found, torch.tensor([-math.log(1 - math.exp(-1.0))]))
