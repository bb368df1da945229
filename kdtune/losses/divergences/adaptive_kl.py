"""Adaptive mixture of forward and reverse KL. Notation as in `base`."""

import torch
from torch import Tensor

from kdtune.losses.divergences.base import TemperedDivergence, ascending, check_range, times
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
        is_head_NV = head_of(p_NV, self.head_mass)
        total_N = gap_NV.sum(-1)
        share_N = (gap_NV * is_head_NV).sum(-1) / total_N
        return torch.where(total_N == 0, 0.5, share_N)


def head_of(p_NV: Tensor, mass: float) -> Tensor:
    """Return which ids are in each row's head, bool [N, V]: the most likely ones that sum to at most `mass`, or the largest alone."""
    descending_NV = ascending(p_NV)[0].flip(-1)
    num_fitting_N1 = (descending_NV.cumsum(-1) <= mass).sum(-1, keepdim=True)
    first_outside_N1 = descending_NV.gather(1, num_fitting_N1.clamp(max=p_NV.shape[1] - 1))
    return (p_NV > first_outside_N1) | (p_NV == descending_NV[:, :1])
