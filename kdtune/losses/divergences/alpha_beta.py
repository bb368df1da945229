"""Alpha-beta divergence. Notation as in `base`."""

import torch
from torch import Tensor

from kdtune.losses.divergences.base import SumOverIds, check_range, is_within, times


class AlphaBeta(SumOverIds):
    """Alpha-beta divergence (ABKD, arXiv 2505.04560).

    -1 / (ab) * sum_v [p^a q^b - a / (a + b) p^(a+b) - b / (a + b) q^(a+b)] with a = alpha and b = beta. The special cases
    are the limits: with E(c) = (exp(c x) - 1) / c, x = t - s and E(0) = x, a term is exp((a + b) s) * (E(a + b) - E(a)) / b
    and its slope -exp((a + b) s) * E(a), whatever a, b and a + b are. (1, 0) is the forward KL, (0, 1) the reverse KL, (0,
    0) half of the sum of squared differences of log-probabilities, (1/2, 1/2) 4 times the squared Hellinger distance. The
    two public implementations scale the limit b = 0 differently, by 1/a and by 1/a²; continuity gives sum_v [p^a (a x - 1) +
    q^a] / a². An f-divergence, and so defined on top-k targets with a tail, only for a + b = 1.

    Args:
        alpha, beta: 0 or above. Below 0 the divergence is infinite for ids that hardly have any probability.
        temperature: both distributions are softmax(logits / temperature). 1: unchanged.
        scale_by_temperature_squared: multiply by temperature squared.
    """

    def __init__(
        self,
        alpha: float = 0.2,
        beta: float = 0.7,
        temperature: float = 1.0,
        scale_by_temperature_squared: bool = False,
    ) -> None:
        super().__init__(temperature, scale_by_temperature_squared)
        check_range("alpha", alpha, lambda a: a >= 0, "0 or above")
        check_range(
            "beta", beta, lambda b: b == 0 or b >= 1e-3, "0, or 0.001 or above (closer to 0 the value loses its digits)"
        )
        self.alpha, self.beta = alpha, beta
        self.label = f"alpha-beta ({alpha:g}, {beta:g})"
        self.lower_bound_on_tail = abs(alpha + beta - 1) < 1e-9

    def terms(self, s_NV: Tensor, t_NV: Tensor) -> tuple[Tensor, Tensor]:
        """Return terms and slopes, [N, V], at temperature 1."""
        a, b = self.alpha, self.beta
        if a and b and is_within(s_NV, 80.0 / (a + b)) and is_within(x_NV := t_NV - s_NV, 80.0 / (a + b)):
            size_NV = ((a + b) * s_NV).exp()  # nothing over- or underflows
            of_a_NV, of_both_NV = (size_NV * (c * x_NV).expm1() for c in (a, a + b))
            return torch.sub(of_both_NV / ((a + b) * b), of_a_NV, alpha=1 / (a * b)), of_a_NV * (-1 / a)
        of_a_NV = self._scaled(a, s_NV, t_NV)
        if b == 0:
            if a == 0:
                x_NV = _difference(s_NV, t_NV)
                return 0.5 * x_NV.square(), -of_a_NV
            return (times(_exp(s_NV, t_NV, 0, a), _difference(s_NV, t_NV)) - of_a_NV) / a, -of_a_NV
        return (self._scaled(a + b, s_NV, t_NV) - of_a_NV) / b, -of_a_NV

    def _scaled(self, c: float, s_NV: Tensor, t_NV: Tensor) -> Tensor:
        """Return exp((a + b) s) * E(c) for c = a or a + b: by expm1 where p and q are close, else as a difference of powers."""
        size_NV, x_NV = _exp(s_NV, t_NV, self.alpha + self.beta, 0), _difference(s_NV, t_NV)
        if c == 0:
            return times(size_NV, x_NV)
        near_NV = x_NV.abs() < 1
        far_NV = _exp(s_NV, t_NV, self.alpha + self.beta - c, c) - size_NV
        return torch.where(near_NV, size_NV * (c * x_NV.masked_fill(~near_NV, 0.0)).expm1(), far_NV) / c


def _exp(s_NV: Tensor, t_NV: Tensor, of_s: float, of_t: float) -> Tensor:
    """Return q^of_s * p^of_t; 0^0 is 1."""
    if not (of_s or of_t):
        return torch.ones_like(s_NV)
    parts = [c * one for c, one in ((of_s, s_NV), (of_t, t_NV)) if c]
    return sum(parts[1:], parts[0]).exp()


def _difference(s_NV: Tensor, t_NV: Tensor) -> Tensor:
    """Return t - s, 0 where both are -inf."""
    x_NV = t_NV - s_NV
    return x_NV if is_within(x_NV) else x_NV.masked_fill((s_NV == -torch.inf) & (t_NV == -torch.inf), 0.0)
