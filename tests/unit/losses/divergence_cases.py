"""Every divergence, with its definition written out in float64 from probabilities: the brute force that tests compare with."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kdtune import losses

Definition = Callable[[Tensor, Tensor], Tensor]


def through_softmax(gradient: Tensor, logp: Tensor) -> Tensor:
    """The gradient with respect to logits of one with respect to log-probabilities."""
    return gradient - logp.exp() * gradient.sum(-1, keepdim=True)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


def jsd(beta: float) -> Definition:
    def value(q: Tensor, p: Tensor) -> Tensor:
        m = beta * p + (1 - beta) * q
        return beta * kl(p, m) + (1 - beta) * kl(q, m)

    return value


def alpha_beta(a: float, b: float) -> Definition:
    def value(q: Tensor, p: Tensor) -> Tensor:
        both = p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)
        return -both.sum(-1) / (a * b)

    return value


def akl(q: Tensor, p: Tensor, mass: float = 0.5) -> Tensor:
    ordered, ids = p.sort(-1, descending=True)
    is_head = (ordered.cumsum(-1) <= mass).index_fill(-1, torch.tensor([0]), True)
    gap = (p - q.detach()).abs().gather(-1, ids)
    w = (gap * is_head).sum(-1) / gap.sum(-1)
    return w * kl(p, q) + (1 - w) * kl(q, p)


def csd(first: str, second: str) -> Definition:
    def value(q: Tensor, p: Tensor) -> Tensor:
        weights = {"student": q.detach(), "teacher": p, "uniform": torch.full_like(p, 1 / p.shape[-1])}
        d, one, two = q.log() - p.log(), weights[first], weights[second]
        if d.shape[-1] > 1000:  # the same sum over pairs, by moments
            mean = [(w * d).sum(-1) for w in (one, two)]
            return ((one + two) * d.square()).sum(-1) / 4 - mean[0] * mean[1] / 2
        pairs = (d[:, :, None] - d[:, None, :]).square()
        return torch.einsum("nv,nu,nvu->n", one, two, pairs) / 4

    return value


def assistant(q: Tensor, p: Tensor, share: float, alpha: float) -> Tensor:
    if alpha == 1:
        r = p**share * q ** (1 - share)
    else:
        a = (1 - alpha) / 2
        r = (share * p**a + (1 - share) * q**a) ** (1 / a)
    return r / r.sum(-1, keepdim=True)


@dataclass(frozen=True)
class Case:
    name: str
    divergence: Callable[..., Tensor]
    definition: Definition
    """Of q (the student's) and p (the teacher's probabilities), both [N, V] in float64; at the temperature already."""
    temperature: float = 1.0
    factor: float = 1.0
    tail: bool = False
    """Defined on top-k targets with a tail."""
    sampled: bool = False
    zero_at_match: bool = True

    @property
    def renormalized(self) -> bool:
        """Finite where the teacher gives an id no probability, and the student some."""
        return self.name.partition(" ")[0] not in ("reverse", "symmetric", "adaptive") and self.name not in (
            "alpha-beta 0 0.8",
            "alpha-beta 0 0",
            "concrete score",
            "concrete score uniform",
            "mixture arithmetic",
        )

    @property
    def has_constants(self) -> bool:
        """Part of the value is taken for a constant, which a difference of two values cannot know."""
        return any(word in self.name for word in ("detached", "taid", "adaptive", "concrete"))

    def exact(self, student_logp: Tensor, teacher_logp: Tensor) -> Tensor:
        """The value [N] by the definition, in float64; differentiable."""
        q, p = ((x.double() / self.temperature).softmax(-1) for x in (student_logp, teacher_logp))
        return self.factor * self.definition(q, p)


def on_ids(name: str, divergence: Callable[..., Tensor], definition: Definition, *, tail: bool = True) -> Case:
    """A sum over ids at temperature 1."""
    return Case(name, divergence, definition, tail=tail, sampled=True)


CASES = [
    on_ids("forward", losses.ForwardKL(), lambda q, p: kl(p, q)),
    on_ids("reverse", losses.ReverseKL(), lambda q, p: kl(q, p)),
    on_ids("symmetric", losses.SymmetricKL(0.3), lambda q, p: 0.3 * kl(p, q) + 0.7 * kl(q, p)),
    on_ids("jsd", losses.JensenShannon(0.5), jsd(0.5)),
    on_ids("jsd 0.9", losses.JensenShannon(0.9), jsd(0.9)),
    on_ids("jsd 0.01", losses.JensenShannon(0.01), jsd(0.01)),
    on_ids("jsd 0.1 normalized", losses.JensenShannon(0.1, normalized=True), lambda q, p: jsd(0.1)(q, p) / 0.09),
    on_ids("total variation", losses.TotalVariation(), lambda q, p: 0.5 * (p - q).abs().sum(-1)),
    on_ids("skew forward", losses.SkewForwardKL(0.1), lambda q, p: kl(p, 0.1 * p + 0.9 * q)),
    on_ids("skew reverse", losses.SkewReverseKL(0.1), lambda q, p: kl(q, 0.9 * p + 0.1 * q)),
    on_ids(
        "skew reverse detached",
        losses.SkewReverseKL(0.1, detach_mixture=True),
        lambda q, p: kl(q, 0.9 * p + 0.1 * q.detach()),
    ),
    on_ids("alpha-beta 0.2 0.7", losses.AlphaBeta(0.2, 0.7), alpha_beta(0.2, 0.7), tail=False),
    on_ids("alpha-beta 0.5 0.5", losses.AlphaBeta(0.5, 0.5), alpha_beta(0.5, 0.5)),
    on_ids(
        "alpha-beta 0.6 0",
        losses.AlphaBeta(0.6, 0.0),
        lambda q, p: (p**0.6 * (0.6 * (p / q).log() - 1) + q**0.6).sum(-1) / 0.36,
        tail=False,
    ),
    on_ids(
        "alpha-beta 0 0.8",
        losses.AlphaBeta(0.0, 0.8),
        lambda q, p: (q**0.8 * (0.8 * (q / p).log() - 1) + p**0.8).sum(-1) / 0.64,
        tail=False,
    ),
    on_ids("alpha-beta 0 0", losses.AlphaBeta(0.0, 0.0), lambda q, p: 0.5 * (q / p).log().square().sum(-1), tail=False),
    Case("adaptive", losses.AdaptiveKL(), akl),
    Case("concrete score", losses.ConcreteScore(), csd("teacher", "student")),
    Case("concrete score uniform", losses.ConcreteScore(("uniform", "uniform")), csd("uniform", "uniform")),
    Case("concrete score teacher", losses.ConcreteScore(("teacher", "teacher")), csd("teacher", "teacher")),
    Case(
        "arg-max",
        losses.ArgMaxCrossEntropy(),
        lambda q, p: -q.gather(-1, p.argmax(-1, keepdim=True)).log().squeeze(-1),
        zero_at_match=False,
    ),
    Case(
        "mixture arithmetic",
        losses.Mixture(losses.ReverseKL(), share=0.3),
        lambda q, p: kl(assistant(q, p, 0.3, -1.0), p),
    ),
    Case(
        "mixture between",
        losses.Mixture(losses.ForwardKL(), share=0.3, alpha=0.2),
        lambda q, p: kl(p, assistant(q, p, 0.3, 0.2)),
    ),
    Case(
        "mixture geometric",
        losses.Mixture(losses.JensenShannon(), share=0.6, alpha=1.0, replaces="teacher"),
        lambda q, p: jsd(0.5)(q, assistant(q, p, 0.6, 1.0)),
    ),
    Case(
        "taid",
        losses.Mixture(losses.ForwardKL(), share=0.6, alpha=1.0, replaces="teacher", detach=True),
        lambda q, p: kl(assistant(q.detach(), p, 0.6, 1.0), q),
    ),
    on_ids(
        "sum",
        losses.WeightedSum([losses.ForwardKL(), losses.JensenShannon(0.2)], [0.7, 1.5]),
        lambda q, p: 0.7 * kl(p, q) + 1.5 * jsd(0.2)(q, p),
    ),
    Case("forward T=2", losses.ForwardKL(2.0), lambda q, p: kl(p, q), temperature=2.0),
    Case("forward T=2 squared", losses.ForwardKL(2.0, True), lambda q, p: kl(p, q), temperature=2.0, factor=4.0),
    Case("reverse T=0.5", losses.ReverseKL(0.5), lambda q, p: kl(q, p), temperature=0.5),
    Case(
        "jsd T=3 squared",
        losses.JensenShannon(0.3, temperature=3.0, scale_by_temperature_squared=True),
        jsd(0.3),
        temperature=3.0,
        factor=9.0,
    ),
    Case(
        "mixture T=2",
        losses.Mixture(losses.ForwardKL(), share=0.3, temperature=2.0, scale_by_temperature_squared=True),
        lambda q, p: kl(p, 0.3 * p + 0.7 * q),
        temperature=2.0,
        factor=4.0,
    ),
    Case("adaptive T=2", losses.AdaptiveKL(temperature=2.0), akl, temperature=2.0),
]
