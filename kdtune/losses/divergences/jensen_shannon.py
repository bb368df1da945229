"""Generalized Jensen-Shannon divergence, and total variation. Notation as in `base`."""

from torch import Tensor

from kdtune.losses.divergences.base import SumOverIds, check_range, log_ratios_to_mixture
from kdtune.losses.divergences.kl import ForwardKL, ReverseKL


class JensenShannon(SumOverIds):
    """Generalized Jensen-Shannon divergence, in nats (GKD, arXiv 2306.13649).

    beta * KL(p || m) + (1 - beta) * KL(q || m) with m = beta * p + (1 - beta) * q. At most the entropy of (beta, 1 - beta),
    log 2 for 1/2. It goes to 0 with beta and with 1 - beta: near the ends it is beta * KL(p || q) and (1 - beta) * KL(q ||
    p), so that beta 0.01 trains about 100 times slower than the forward KL. Divided by beta * (1 - beta), which `normalized`
    does, it goes to the forward KL at 0 and the reverse KL at 1. Other tools: TRL and Liger take the two KLs at beta 0 and 1
    and this formula, not normalized, between them, which is a jump.

    Args:
        beta: the teacher's share of the mixture, between 0 and 1; the ends only with `normalized`.
        normalized: divide by beta * (1 - beta).
        temperature: both distributions are softmax(logits / temperature). 1: unchanged.
        scale_by_temperature_squared: multiply by temperature squared.
    """

    def __init__(
        self,
        beta: float = 0.5,
        normalized: bool = False,
        temperature: float = 1.0,
        scale_by_temperature_squared: bool = False,
    ) -> None:
        super().__init__(temperature, scale_by_temperature_squared)
        allowed = "between 1e-6 and 1 - 1e-6; at the ends it is 0, and with normalized=true the forward (0) and reverse KL (1)"
        self.beta = check_range("beta", beta, lambda b: 1e-6 <= b <= 1 - 1e-6 or (normalized and b in (0, 1)), allowed)
        self.normalized = normalized
        self.label = f"{'normalized ' if normalized else ''}JSD ({beta:g})"

    def terms(self, s_NV: Tensor, t_NV: Tensor) -> tuple[Tensor, Tensor]:
        """Return terms and slopes, [N, V], at temperature 1."""
        beta, rest = self.beta, 1 - self.beta
        if beta in (0, 1):
            return (ReverseKL() if beta else ForwardKL()).terms(s_NV, t_NV)
        s_ratio_NV, t_ratio_NV = log_ratios_to_mixture(s_NV, t_NV, beta)
        size = beta * rest if self.normalized else 1.0
        # The derivatives through the mixture cancel between the two parts.
        slope_NV = (rest / size) * s_NV.exp() * s_ratio_NV
        return (beta / size) * t_NV.exp() * t_ratio_NV + slope_NV, slope_NV


class TotalVariation(SumOverIds):
    """Total variation distance, half of sum_v |p - q|, from 0 to 1 (f-DISTILL, arXiv 2307.15190).

    Its gradient vanishes where the student is confident, right or wrong.

    Args:
        temperature: both distributions are softmax(logits / temperature). 1: unchanged.
        scale_by_temperature_squared: multiply by temperature squared, as DistillKit does.
    """

    label = "total variation"

    def terms(self, s_NV: Tensor, t_NV: Tensor) -> tuple[Tensor, Tensor]:
        """Return terms and slopes, [N, V], at temperature 1."""
        q_NV = s_NV.exp()
        difference_NV = 0.5 * (q_NV - t_NV.exp())
        return difference_NV.abs(), 0.5 * q_NV * difference_NV.sign()
