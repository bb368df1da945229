"""Adaptive mixture of forward and reverse KL. Notation as in `base`."""

import torch
from torch import Tensor

from kdtune.losses.divergences.base import TemperedDivergence, check_range, times
from kdtune.losses.divergences.kl import ForwardKL, ReverseKL


class AdaptiveKL(TemperedDivergence):
    """Adaptive KL divergence: more of the direction that suits where the models differ, in nats (AKL, arXiv 2404.02657).

    w * KL(p || q) + (1 - w) * KL(q || p). The teacher's head is its most likely ids as long as their probabilities sum to at
    most `head_mass`, and always the most likely one; w is the head's share of sum_v |p - q|, taken for a constant. Where the
    two agree w is 1/2; AKL's and DSKD's codes give 0 / 0 there. DSKD puts the id that crosses `head_mass` into the head,
    AKL's code and this class into the tail. Ids that share the crossing probability stay together, in the tail.

    Args:
        head_mass: largest probability of the head, above 0 and below 1.
        temperature: both distributions are softmax(logits / temperature). 1: unchanged.
        scale_by_temperature_squared: multiply by temperature squared.
    """

    def __init__(
        self, head_mass: float = 0.5, temperature: float = 1.0, scale_by_temperature_squared: bool = False
    ) -> None:
        super().__init__(temperature, scale_by_temperature_squared)
        self.head_mass = check_range("head_mass", head_mass, lambda mass: 0 < mass < 1, "above 0 and below 1")
        self.label = f"adaptive KL ({head_mass:g})"

    def compare(self, s_NV: Tensor, t_NV: Tensor) -> tuple[Tensor, Tensor]:
        """Return value [N] and slope [N, V], at temperature 1."""
        w_N = self._forward_weight(s_NV.detach(), t_NV)
        (forward_N, forward_NV), (reverse_N, reverse_NV) = (
            one.compare(s_NV, t_NV) for one in (ForwardKL(), ReverseKL())
        )
        slope_NV = w_N[:, None] * forward_NV + (1 - w_N)[:, None] * reverse_NV
        return times(w_N, forward_N) + times(1 - w_N, reverse_N), slope_NV

    def _forward_weight(self, s_NV: Tensor, t_NV: Tensor) -> Tensor:
        p_NV = t_NV.exp()
        gap_NV = (p_NV - s_NV.exp()).abs()
        is_head_NV = p_NV >= least_head_probability(p_NV, self.head_mass)
        total_N = gap_NV.sum(-1)
        share_N = (gap_NV * is_head_NV).sum(-1) / total_N
        return torch.where(total_N == 0, 0.5, share_N)


def least_head_probability(p_NV: Tensor, mass: float) -> Tensor:
    """Return the smallest probability of each row's head, [N, 1]: ids from there up sum to at most `mass`, or are the largest alone.

    By bisection over the floating-point numbers between 0 and the largest probability, one masked sum each: for 128,256 ids
    a sort takes many times as long, and how much of a row a partial sort must cover is known only afterwards.
    """
    largest_N1 = p_NV.amax(-1, keepdim=True)
    # Non-negative floating-point numbers are ordered as the integers of the same bits.
    integers = torch.int64 if p_NV.dtype == torch.float64 else torch.int32
    low_N1, high_N1 = torch.zeros_like(largest_N1).view(integers), largest_N1.view(integers).clone()
    for _ in range(62 if integers == torch.int64 else 30):  # the exponent's bits below 1, and the fraction's
        middle_N1 = low_N1 + (high_N1 - low_N1) // 2
        fits_N1 = (p_NV * (p_NV >= middle_N1.view(p_NV.dtype))).sum(-1, keepdim=True) <= mass
        high_N1 = torch.where(fits_N1, middle_N1, high_N1)
        low_N1 = torch.where(fits_N1, low_N1, middle_N1)
    return high_N1.view(p_NV.dtype)
