"""Kullback-Leibler divergences in both directions, their weighted sum, and their skew forms. Notation as in `base`."""

import torch
from torch import Tensor

from kdtune.losses.divergences.base import (
    SumOverIds,
    check_range,
    is_within,
    log_ratios_to_mixture,
    raised,
    times,
    zero_outside,
)


def forward_kl(student_logp_NV: Tensor, teacher_logp_NV: Tensor) -> Tensor:
    """Return KL(teacher || student) of every token in nats, [N]; 0 where the two agree.

    sum_v p_v (log p_v - log q_v) with p the teacher's and q the student's probabilities, at temperature 1: Hinton,
    Vinyals and Dean, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531, section 2. The paper trains on
    the cross entropy -sum_v p_v log q_v; subtracting the teacher's entropy leaves the gradient as it is and makes the
    value 0 at a match.

    Arguments are natural log-probabilities, each row summing to 1, at least fp32 (half precision is raised to fp32,
    float64 stays). Ids to which the teacher gives no probability add 0, whatever the student says; a token is inf
    where the student excludes (-inf) an id to which the teacher gives some.
    """
    s_NV, t_NV = raised(student_logp_NV, teacher_logp_NV)
    return _forward_terms(s_NV, t_NV)[0].sum(-1)


def _forward_terms(s_NV: Tensor, t_NV: Tensor) -> tuple[Tensor, Tensor]:
    p_NV = t_NV.exp()
    return times(p_NV, t_NV - s_NV), -p_NV


def _reverse_terms(s_NV: Tensor, t_NV: Tensor) -> tuple[Tensor, Tensor]:
    q_NV = s_NV.exp()
    terms_NV = times(q_NV, s_NV - t_NV)
    return terms_NV, terms_NV + q_NV


class ForwardKL(SumOverIds):
    """Forward KL divergence, KL(teacher || student) = sum_v p (t - s), in nats; see `forward_kl` (arXiv 1503.02531).

    Other tools: torchtune, DistiLLM's and MiniLLM's code leave out the teacher's entropy (same gradient, a value that is not
    0 at a match); Model-Optimizer, DistillKit and NeMo Automodel multiply by temperature squared, TRL and Liger do not.

    Args:
        temperature: both distributions are softmax(logits / temperature). 1: unchanged.
        scale_by_temperature_squared: multiply by temperature squared, as the paper does to keep the gradient's size.
    """

    label = "KL"

    def terms(self, s_NV: Tensor, t_NV: Tensor) -> tuple[Tensor, Tensor]:
        """Return terms and slopes, [N, V], at temperature 1."""
        return _forward_terms(s_NV, t_NV)


class ReverseKL(SumOverIds):
    """Reverse KL divergence, KL(student || teacher) = sum_v q (s - t), in nats (MiniLLM, arXiv 2306.08543).

    Infinite where the student gives probability to an id to which the teacher gives none. Other tools: NeMo-RL renormalizes
    both over the teacher's top 64 ids; EasyDistill cuts p off at 1e-10.

    Args:
        temperature: both distributions are softmax(logits / temperature). 1: unchanged.
        scale_by_temperature_squared: multiply by temperature squared.
    """

    label = "reverse KL"

    def terms(self, s_NV: Tensor, t_NV: Tensor) -> tuple[Tensor, Tensor]:
        """Return terms and slopes, [N, V], at temperature 1."""
        return _reverse_terms(s_NV, t_NV)


class SymmetricKL(SumOverIds):
    """Weighted sum of both directions of the KL divergence, in nats.

    forward_weight * KL(teacher || student) + (1 - forward_weight) * KL(student || teacher).

    Other tools: torchtune's `sym_kd_ratio` is this weight; DistiLLM's `lam` (0.9) is the weight of the reverse direction.

    Args:
        forward_weight: weight of the forward direction, 0 to 1; 1/2 is half of Jeffreys' divergence.
        temperature: both distributions are softmax(logits / temperature). 1: unchanged.
        scale_by_temperature_squared: multiply by temperature squared.
    """

    def __init__(
        self, forward_weight: float = 0.5, temperature: float = 1.0, scale_by_temperature_squared: bool = False
    ) -> None:
        super().__init__(temperature, scale_by_temperature_squared)
        self.forward_weight = check_range("forward_weight", forward_weight, lambda w: 0 <= w <= 1, "from 0 to 1")
        self.label = f"{forward_weight:g} KL + {1 - forward_weight:g} reverse KL"

    def terms(self, s_NV: Tensor, t_NV: Tensor) -> tuple[Tensor, Tensor]:
        """Return terms and slopes, [N, V], at temperature 1."""
        if self.forward_weight in (0, 1):  # the other direction may be infinite
            return _forward_terms(s_NV, t_NV) if self.forward_weight else _reverse_terms(s_NV, t_NV)
        w, v = self.forward_weight, 1 - self.forward_weight
        d_NV, p_NV, q_NV = s_NV - t_NV, t_NV.exp(), s_NV.exp()
        difference_NV = torch.sub(v * q_NV, p_NV, alpha=w)
        if is_within(d_NV):
            return difference_NV * d_NV, torch.addcmul(difference_NV, q_NV, d_NV, value=v)
        reverse_NV = times(q_NV, d_NV)
        return v * reverse_NV - w * times(p_NV, d_NV), difference_NV + v * reverse_NV


class SkewForwardKL(SumOverIds):
    """Skew KL divergence, KL(p || alpha p + (1 - alpha) q), in nats (DistiLLM, arXiv 2402.03898).

    At most -log(alpha).

    DistiLLM's code leaves out the teacher's entropy, and takes the logarithm of a sum of probabilities, which is NaN where both
    underflow.

    Args:
        alpha: the teacher's share of the mixture, from 0 (forward KL) to below 1.
        temperature: both distributions are softmax(logits / temperature). 1: unchanged.
        scale_by_temperature_squared: multiply by temperature squared.
    """

    def __init__(
        self, alpha: float = 0.1, temperature: float = 1.0, scale_by_temperature_squared: bool = False
    ) -> None:
        super().__init__(temperature, scale_by_temperature_squared)
        self.alpha = check_range("alpha", alpha, lambda a: a == 0 or 1e-6 <= a < 1, "0, or from 1e-6 to below 1")
        self.label = f"skew KL ({alpha:g})"

    def terms(self, s_NV: Tensor, t_NV: Tensor) -> tuple[Tensor, Tensor]:
        """Return terms and slopes, [N, V], at temperature 1."""
        if self.alpha == 0:
            return _forward_terms(s_NV, t_NV)
        s_ratio_NV, t_ratio_NV = log_ratios_to_mixture(s_NV, t_NV, self.alpha)
        p_NV = t_NV.exp()
        share_NV = zero_outside((1 - self.alpha) * s_ratio_NV.exp(), s_NV)  # of the mixture, the student's
        return p_NV * t_ratio_NV, -p_NV * share_NV


class SkewReverseKL(SumOverIds):
    """Skew reverse KL divergence, KL(q || (1 - alpha) p + alpha q), in nats (DistiLLM, arXiv 2402.03898).

    At most -log(alpha).

    Finite where the teacher gives an id no probability, unlike the reverse KL.

    Args:
        alpha: the student's share of the mixture, from 0 (reverse KL) to below 1.
        detach_mixture: no gradient through the mixture, as DistiLLM-2's code (arXiv 2503.07067) has it; the value is the same.
        temperature: both distributions are softmax(logits / temperature). 1: unchanged.
        scale_by_temperature_squared: multiply by temperature squared.
    """

    def __init__(
        self,
        alpha: float = 0.1,
        detach_mixture: bool = False,
        temperature: float = 1.0,
        scale_by_temperature_squared: bool = False,
    ) -> None:
        super().__init__(temperature, scale_by_temperature_squared)
        self.alpha = check_range("alpha", alpha, lambda a: a == 0 or 1e-6 <= a < 1, "0, or from 1e-6 to below 1")
        self.detach_mixture = detach_mixture
        self.label = f"skew reverse KL ({alpha:g})"

    def terms(self, s_NV: Tensor, t_NV: Tensor) -> tuple[Tensor, Tensor]:
        """Return terms and slopes, [N, V], at temperature 1."""
        if self.alpha == 0:
            return _reverse_terms(s_NV, t_NV)
        s_ratio_NV, _ = log_ratios_to_mixture(s_NV, t_NV, 1 - self.alpha)
        q_NV = s_NV.exp()
        if self.detach_mixture:
            # The same value; its derivative is that of s alone.
            free_NV = zero_outside(s_NV - s_NV.detach(), s_NV)
            return q_NV * (s_ratio_NV.detach() + free_NV), q_NV * (s_ratio_NV + 1)
        terms_NV = q_NV * s_ratio_NV
        return terms_NV, terms_NV + torch.addcmul(q_NV, q_NV, s_ratio_NV.exp(), value=-self.alpha)
