"""What must hold for the divergences whatever the distributions are."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from divergence_cases import CASES, Case, through_softmax
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kdtune import losses
from kdtune.losses import SampledTargets, TopKTargets, value_and_gradient
from kdtune.losses.sparse import sparse_value_and_gradient

each = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
quickly = settings(max_examples=25, deadline=None)
Divergence = Callable[[Tensor, Tensor], Tensor]


def logits(size: int = 6) -> st.SearchStrategy[Tensor]:
    number = st.floats(-15, 15, width=32)
    return st.lists(number, min_size=size, max_size=size).map(lambda x: torch.tensor([x], dtype=torch.float64))


pair = given(z=logits(), y=logits())


def both(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return z.log_softmax(-1), y.log_softmax(-1)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@each
@quickly
@pair
def test_never_negative_and_zero_where_the_two_agree(case: Case, z: Tensor, y: Tensor) -> None:
    s, t = both(z, y)
    assert case.divergence(s, t).item() >= -1e-12
    if case.zero_at_match:
        value, gradient = value_and_gradient(case.divergence, t, t + 0.0)
        assert abs(value.item()) < 1e-12
        # Through the softmax, where the two agree nothing is left to learn.
        assert through_softmax(gradient, t).abs().max() < 1e-12


@each
@quickly
@pair
def test_zero_only_where_the_two_agree(case: Case, z: Tensor, y: Tensor) -> None:
    s, t = both(z, y)
    if case.zero_at_match and (s.exp() - t.exp()).abs().max() > 1e-3:
        assert case.divergence(s, t).item() > 1e-9


@pytest.mark.parametrize(
    "divergence",
    [
        losses.SymmetricKL(0.5), losses.JensenShannon(0.5), losses.TotalVariation(), losses.AlphaBeta(0.5, 0.5),
        losses.AlphaBeta(0.3, 0.3), losses.AlphaBeta(0.0, 0.0), losses.ConcreteScore(("uniform", "uniform")),
        losses.ConcreteScore(("student", "teacher")),
    ],
    ids=lambda one: one.label,
)  # fmt: skip
@quickly
@pair
def test_symmetric(divergence: Divergence, z: Tensor, y: Tensor) -> None:
    s, t = both(z, y)
    close(divergence(s, t), divergence(t, s))


def hellinger(s: Tensor, t: Tensor) -> Tensor:
    return 2 * ((s / 2).exp() - (t / 2).exp()).square().sum(-1)


SAME: list[tuple[str, Divergence, Divergence, float]] = [
    ("skew forward at 0", losses.SkewForwardKL(0.0), losses.ForwardKL(), 1e-9),
    ("skew reverse at 0", losses.SkewReverseKL(0.0), losses.ReverseKL(), 1e-9),
    ("normalized JSD at 0", losses.JensenShannon(0.0, normalized=True), losses.ForwardKL(), 1e-9),
    ("normalized JSD at 1", losses.JensenShannon(1.0, normalized=True), losses.ReverseKL(), 1e-9),
    ("alpha-beta (1, 0)", losses.AlphaBeta(1.0, 0.0), losses.ForwardKL(), 1e-9),
    ("alpha-beta (0, 1)", losses.AlphaBeta(0.0, 1.0), losses.ReverseKL(), 1e-9),
    ("alpha-beta (1/2, 1/2)", losses.AlphaBeta(0.5, 0.5), hellinger, 1e-9),
    ("symmetric at 1", losses.SymmetricKL(1.0), losses.ForwardKL(), 1e-9),
    ("symmetric at 0", losses.SymmetricKL(0.0), losses.ReverseKL(), 1e-9),
    (
        "symmetric is a sum",
        losses.SymmetricKL(0.7),
        losses.WeightedSum([losses.ForwardKL(), losses.ReverseKL()], [0.7, 0.3]),
        1e-9,
    ),
    ("arithmetic assistant for the student", losses.Mixture(losses.ForwardKL(), 0.1), losses.SkewForwardKL(0.1), 1e-9),
    (
        "arithmetic assistant for the teacher",
        losses.Mixture(losses.ReverseKL(), 0.9, replaces="teacher"),
        losses.SkewReverseKL(0.1),
        1e-9,
    ),
    (
        "the same, detached",
        losses.Mixture(losses.ReverseKL(), 0.9, replaces="teacher", detach=True),
        losses.SkewReverseKL(0.1, detach_mixture=True),
        1e-9,
    ),
    (
        "an assistant that is the teacher",
        losses.Mixture(losses.ForwardKL(), 1.0, 1.0, "teacher"),
        losses.ForwardKL(),
        1e-9,
    ),
    ("an assistant that is the student", losses.Mixture(losses.ReverseKL(), 0.0, 0.3), losses.ReverseKL(), 1e-9),
]


@pytest.mark.parametrize(("one", "other", "tolerance"), [x[1:] for x in SAME], ids=[x[0] for x in SAME])
@quickly
@pair
def test_two_names_of_one_divergence(
    one: Divergence, other: Divergence, tolerance: float, z: Tensor, y: Tensor
) -> None:
    """The same value and the same gradient through the softmax."""
    s, t = both(z, y)
    gradients = []
    for divergence in (one, other):
        value, gradient = value_and_gradient(divergence, s, t)
        close(value, other(s, t), tolerance)
        gradients.append(through_softmax(gradient, s))
    close(*gradients, tolerance)


LIMITS: list[tuple[str, Callable[[float], Divergence], Divergence]] = [
    ("skew forward", lambda e: losses.SkewForwardKL(e), losses.ForwardKL()),
    ("skew reverse", lambda e: losses.SkewReverseKL(e), losses.ReverseKL()),
    ("normalized JSD to 0", lambda e: losses.JensenShannon(e, normalized=True), losses.ForwardKL()),
    ("normalized JSD to 1", lambda e: losses.JensenShannon(1 - e, normalized=True), losses.ReverseKL()),
    ("alpha-beta, b to 0", lambda e: losses.AlphaBeta(0.6, 1e3 * e), losses.AlphaBeta(0.6, 0.0)),
    ("alpha-beta, a to 0", lambda e: losses.AlphaBeta(e, 0.8), losses.AlphaBeta(0.0, 0.8)),
    ("alpha-beta, both to 0", lambda e: losses.AlphaBeta(e, 1e3 * e), losses.AlphaBeta(0.0, 0.0)),
    (
        "mixture to geometric",
        lambda e: losses.Mixture(losses.ForwardKL(), 0.4, 1 - 1e4 * e),
        losses.Mixture(losses.ForwardKL(), 0.4, 1.0),
    ),
]


@pytest.mark.parametrize(("approaching", "limit"), [x[1:] for x in LIMITS], ids=[x[0] for x in LIMITS])
def test_limits_are_continuous(approaching: Callable[[float], Divergence], limit: Divergence) -> None:
    """Value and gradient come closer in proportion to the parameter."""
    generator = torch.Generator().manual_seed(0)
    s, t = (torch.randn(20, 8, generator=generator, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    exact, exact_gradient = value_and_gradient(limit, s, t)

    def distance(e: float) -> float:
        value, gradient = value_and_gradient(approaching(e), s, t)
        return float((value - exact).norm() + through_softmax(gradient - exact_gradient, s).norm())

    assert distance(1e-6) < 0.02 * float(exact.norm())
    assert distance(1e-6) < 0.11 * distance(1e-5)


def test_jsd_goes_to_zero_with_its_weight() -> None:
    """Not to the forward KL: near 0 it is beta times that."""
    s, t = both(
        torch.tensor([[0.3, -1.0, 2.0]], dtype=torch.float64), torch.tensor([[1.0, 0.2, -0.5]], dtype=torch.float64)
    )
    kl = losses.ForwardKL()(s, t)
    close(losses.JensenShannon(1e-4)(s, t), 1e-4 * kl, 1e-6)


@pytest.mark.parametrize("case", [c for c in CASES if c.tail], ids=lambda case: case.name)
@quickly
@given(z=logits(), y=logits(), k=st.integers(1, 5))
def test_the_tail_is_a_lower_bound(case: Case, z: Tensor, y: Tensor, k: int) -> None:
    s, t = both(z, y)
    value, _ = sparse_value_and_gradient(case.divergence, s, TopKTargets(k).of(t))
    assert -1e-12 <= value.item() <= case.divergence(s, t).item() + 1e-9


@pytest.mark.parametrize("case", [c for c in CASES if c.tail], ids=lambda case: case.name)
def test_all_ids_and_no_tail_is_the_whole_divergence(case: Case) -> None:
    generator = torch.Generator().manual_seed(0)
    s, t = (torch.randn(20, 8, generator=generator, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    found = sparse_value_and_gradient(case.divergence, s, TopKTargets(8).of(t))
    for one, whole in zip(found, value_and_gradient(case.divergence, s, t), strict=True):
        close(one, whole)


@pytest.mark.parametrize("exponent", [1.0, 0.7])
@pytest.mark.parametrize("case", [c for c in CASES if c.sampled], ids=lambda case: case.name)
def test_draws_are_unbiased(case: Case, exponent: float) -> None:
    """The mean over 20,000 independent estimates is within 4.5 standard errors, for the value and every part of the gradient."""
    generator = torch.Generator().manual_seed(0)
    s, t = (torch.randn(1, 6, generator=generator, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    many = 20_000
    torch.manual_seed(1)
    rows = SampledTargets(3, exponent).of(t.expand(many, -1))
    values, gradients = sparse_value_and_gradient(case.divergence, s.expand(many, -1), rows)
    exact, exact_gradient = value_and_gradient(case.divergence, s, t)
    for estimates, wanted in ((values[:, None], exact[:, None]), (gradients, exact_gradient)):
        error = estimates.std(0) / math.sqrt(many)
        assert ((estimates.mean(0) - wanted[0]).abs() <= 4.5 * error + 1e-12).all()


@quickly
@given(z=logits(), y=logits(), temperature=st.floats(0.3, 20))
def test_a_temperature_is_that_of_the_logits(z: Tensor, y: Tensor, temperature: float) -> None:
    s, t = both(z, y)
    cold = both(z / temperature, y / temperature)
    for plain, tempered in (
        (losses.ForwardKL(), losses.ForwardKL(temperature)),
        (losses.JensenShannon(0.3), losses.JensenShannon(0.3, temperature=temperature)),
        (losses.AdaptiveKL(), losses.AdaptiveKL(temperature=temperature)),
    ):
        close(tempered(s, t), plain(*cold))
    squared = losses.ReverseKL(temperature, scale_by_temperature_squared=True)
    close(squared(s, t), temperature**2 * losses.ReverseKL()(*cold))


def test_a_high_temperature_matches_logits() -> None:
    """T² KL goes to half of the variance of the logits' differences, and its gradient with it (arXiv 1503.02531, section 2.1)."""
    generator = torch.Generator().manual_seed(0)
    s, t = (torch.randn(5, 9, generator=generator, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    hot, uniform = losses.ForwardKL(1e4, True), losses.ConcreteScore(("uniform", "uniform"))
    for one, other in zip(value_and_gradient(hot, s, t), value_and_gradient(uniform, s, t), strict=True):
        close(one - one.mean(-1, keepdim=True) if one.ndim > 1 else one, other, 1e-3)


def test_close_distributions_keep_their_digits_in_fp32() -> None:
    """Where the models nearly agree, a mixture's logarithm minus its part's would lose most digits."""
    generator = torch.Generator().manual_seed(0)
    s = (3 * torch.randn(4, 1000, generator=generator, dtype=torch.float64)).log_softmax(-1).float()
    t = (s + 1e-3 * torch.randn(4, 1000, generator=generator)).float()
    for divergence in (
        losses.JensenShannon(0.01),
        losses.JensenShannon(0.5),
        losses.SkewReverseKL(0.9),
        losses.AlphaBeta(),
    ):
        _, gradient = value_and_gradient(divergence, s, t)
        _, exact = value_and_gradient(divergence, s.double(), t.double())
        assert (gradient - exact).norm() < 1e-5 * exact.norm()


def test_full_reverse_kl_is_the_expectation_of_k2() -> None:
    """On an enumerable model (5 ids, length 3): the gradient of the reverse KL on the student's prefixes, their probabilities
    taken for constants, is that of the mean over all 125 texts of sum_t d_t² / 2 with d_t = log q - log p of token t.
    """
    ids, length = 5, 3
    prefixes = [x for n in range(length) for x in itertools.product(range(ids), repeat=n)]
    generator = torch.Generator().manual_seed(0)
    z, y = (torch.randn(len(prefixes), ids, generator=generator, dtype=torch.float64) for _ in range(2))
    logq, logp = z.requires_grad_().log_softmax(-1), y.log_softmax(-1)
    row = {prefix: i for i, prefix in enumerate(prefixes)}

    def log_probability(text: tuple[int, ...]) -> Tensor:
        return sum((logq[row[text[:i]], text[i]] for i in range(len(text))), torch.zeros((), dtype=torch.float64))

    weights = torch.stack([log_probability(prefix).exp() for prefix in prefixes]).detach()
    full = (weights * losses.ReverseKL()(logq, logp)).sum()
    k2: Tensor = torch.zeros((), dtype=torch.float64)
    for text in itertools.product(range(ids), repeat=length):
        d = torch.stack([(logq - logp)[row[text[:i]], text[i]] for i in range(length)])
        k2 = k2 + log_probability(text).exp().detach() * (d.square() / 2).sum()
    (of_full,), (of_k2,) = torch.autograd.grad(full, z, retain_graph=True), torch.autograd.grad(k2, z)
    torch.testing.assert_close(of_full, of_k2, rtol=1e-12, atol=1e-14)
