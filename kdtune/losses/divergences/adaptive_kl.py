"""Adaptive mixture of forward and reverse KL. Notation as in `base`."""

import torch
from torch import Tensor

from kdtune.losses.divergences.base import TemperedDivergence, check_range, times


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
        d_NV, p_NV, q_NV = s_NV - t_NV, t_NV.exp(), s_NV.exp()
        w_N = self._forward_weight(q_NV.detach(), p_NV)
        reverse_NV = times(q_NV, d_NV)
        values_N = times(1 - w_N, reverse_NV.sum(-1)) - times(w_N, times(p_NV, d_NV).sum(-1))
        return values_N, torch.addcmul((1 - w_N)[:, None] * (reverse_NV + q_NV), w_N[:, None], p_NV, value=-1)

    def _forward_weight(self, q_NV: Tensor, p_NV: Tensor) -> Tensor:
        gap_NV = (p_NV - q_NV).abs()
        total_N = gap_NV.sum(-1)
        share_N = (gap_NV * head_of(p_NV, self.head_mass)).sum(-1) / total_N
        return torch.where(total_N == 0, 0.5, share_N)


def head_of(p_NV: Tensor, mass: float) -> Tensor:
    """Return which ids are in each row's head, bool [N, V]: the most likely ones that sum to at most `mass`, or the largest alone."""
    return p_NV > _below_head(p_NV.detach(), mass)


# An operation of its own for torch.compile, which would not compile the choice of a few ids on the host.
@torch.library.custom_op("kdtune::below_head", mutates_args=())
def _below_head(p_NV: Tensor, mass: float) -> Tensor:
    """Return a number of each row, [N, 1], that the probabilities of the head alone are above.

    That is the largest v whose ids of probability v and more sum to above `mass`, and the next number below the largest if none fits.
    """
    if p_NV.numel() == 0:
        return p_NV.new_zeros(len(p_NV), 1)
    if p_NV.device.type == "cpu":
        outside_N1 = torch.stack([_first_outside_row(row, mass) for row in p_NV])[:, None]
    else:
        descending_NV = p_NV.sort(-1, descending=True).values
        num_fitting_N1 = (descending_NV.cumsum(-1) <= mass).sum(-1, keepdim=True)
        outside_N1 = descending_NV.gather(1, num_fitting_N1.clamp(max=p_NV.shape[1] - 1))
    largest_N1 = p_NV.amax(-1, keepdim=True)
    return torch.minimum(outside_N1, largest_N1.nextafter(torch.zeros_like(largest_N1)))


@_below_head.register_fake
def _(p_NV: Tensor, mass: float) -> Tensor:
    return p_NV.new_empty(p_NV.shape[0], 1)  # len would fix the number of tokens


def _first_outside_row(p_V: Tensor, mass: float) -> Tensor:
    """Return the largest probability outside a row's head, on a CPU.

    Probabilities are summed by their first 16 bits, and sorted where the sum gets to `mass`. A row of 128,256 ids takes 0.4 ms, a
    sort by radix 1.4, `sort` of fp32 4.2 ms.
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
