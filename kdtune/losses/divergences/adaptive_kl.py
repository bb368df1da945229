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
        is_head_NV = head_of(p_NV, self.head_mass)
        total_N = gap_NV.sum(-1)
        share_N = (gap_NV * is_head_NV).sum(-1) / total_N
        return torch.where(total_N == 0, 0.5, share_N)


def head_of(p_NV: Tensor, mass: float) -> Tensor:
    """Return which ids are in each row's head, bool [N, V]: the most likely ones that sum to at most `mass`, or the largest alone."""
    first_outside_N1 = _first_outside(p_NV.detach(), mass)
    return (p_NV > first_outside_N1) | (p_NV == p_NV.amax(-1, keepdim=True))


# An operation of its own for torch.compile, which would not compile the choice of a few ids on the host.
@torch.library.custom_op("kdtune::first_outside_head", mutates_args=())
def _first_outside(p_NV: Tensor, mass: float) -> Tensor:
    """Return the largest probability outside the head, [N, 1]: the largest v whose ids of probability v and more sum to above `mass`."""
    if p_NV.device.type == "cpu" and p_NV.numel():
        return torch.stack([_first_outside_row(row, mass) for row in p_NV])[:, None]
    descending_NV = p_NV.sort(-1, descending=True).values
    num_fitting_N1 = (descending_NV.cumsum(-1) <= mass).sum(-1, keepdim=True)
    return descending_NV.gather(1, num_fitting_N1.clamp(max=p_NV.shape[1] - 1))


@_first_outside.register_fake
def _(p_NV: Tensor, mass: float) -> Tensor:
    return p_NV.new_empty(p_NV.shape[0], 1)  # len would fix the number of tokens


def _first_outside_row(p_V: Tensor, mass: float) -> Tensor:
    """As `_first_outside`, of a row on a CPU: probabilities are summed by the first 16 bits, and sorted where the sum gets to `mass`.

    A row of 128,256 ids takes 0.4 ms, a sort by radix 1.4, `sort` of fp32 4.2 ms.
    """
    size = p_V.element_size()
    # As non-negative numbers are ordered as the integers of their bits; those up to 1 fill the first quarter.
    class_V = p_V.view(torch.int32 if size == 4 else torch.int64) >> (8 * size - 16)
    above_C = torch.bincount(class_V, weights=p_V.double(), minlength=2**14).flip(0).cumsum(0)
    place = min(int((above_C <= mass).sum()), len(above_C) - 1)
    members = p_V[class_V == len(above_C) - 1 - place].sort(descending=True).values
    if len(members) == 0:  # all of them sum to no more than the mass
        return p_V.amin()
    rest = mass - (above_C[place - 1] if place else 0.0)
    return members[min(int((members.double().cumsum(0) <= rest).sum()), len(members) - 1)]
