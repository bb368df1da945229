"""Concrete score matching: differences of logits. Notation as in `base`."""

from typing import Literal

import torch
from torch import Tensor

from kdtune.errors import ConfigError
from kdtune.losses.divergences.base import TemperedDivergence, is_within

Weight = Literal["student", "teacher", "uniform"]


class ConcreteScore(TemperedDivergence):
    """Concrete score matching: all differences of two logits (CSD, arXiv 2509.25837).

    1/4 * sum_vu w1_v w2_u (d_v - d_u)², with d = s - t, the difference of the logits. It is 0 if and only if all differences
    of two logits are the same in both models, wherever w1 and w2 are above 0. The weights are probabilities, taken for
    constants; with w1 = w2 = w it is half of the variance of d under w. The gradient is 1/2 [w1 (d - E_w2 d) + w2 (d - E_w1
    d)]: linear in V. An id with a weight that one of the two excludes makes it infinite; one that both exclude counts
    nowhere.

    Args:
        weights: w1 and w2, each "student", "teacher" (its softmax) or "uniform" (1 / V).
        temperature: both distributions are softmax(logits / temperature). 1: unchanged.
        scale_by_temperature_squared: multiply by temperature squared.
    """

    def __init__(
        self,
        weights: tuple[Weight, Weight] = ("teacher", "student"),
        temperature: float = 1.0,
        scale_by_temperature_squared: bool = False,
    ) -> None:
        super().__init__(temperature, scale_by_temperature_squared)
        if len(weights) != 2 or not set(weights) <= {"student", "teacher", "uniform"}:
            raise ConfigError(f"weights={list(weights)}: must be two of student, teacher, uniform")
        self.weights = tuple(weights)
        self.label = f"concrete score ({', '.join(weights)})"

    def compare(self, s_NV: Tensor, t_NV: Tensor) -> tuple[Tensor, Tensor]:
        """Return value [N] and slope [N, V], at temperature 1."""
        w1_NV, w2_NV = (_weights(name, s_NV, t_NV) for name in self.weights)
        d_NV, infinite_N = s_NV - t_NV, None
        if not is_within(d_NV):  # a model excludes an id
            d_NV = d_NV.masked_fill(_neither(s_NV, t_NV) | ((w1_NV == 0) & (w2_NV == 0)), 0.0)
            infinite_N = d_NV.isinf().any(-1)
            d_NV = d_NV.masked_fill(d_NV.isinf(), 0.0)
        mean1_N1, mean2_N1 = ((w_NV * d_NV).sum(-1, keepdim=True) for w_NV in (w1_NV, w2_NV))
        # Centred before it is squared: d may have a constant that is large beside its differences.
        centred_NV = d_NV - 0.5 * (mean1_N1 + mean2_N1)
        weighted_NV = torch.lerp(w1_NV, w2_NV, 0.5) * centred_NV
        half_N1 = 0.5 * (mean1_N1 - mean2_N1)
        values_N = 0.5 * (weighted_NV * centred_NV).sum(-1) + 0.5 * half_N1.square().squeeze(-1)
        slope_NV = torch.addcmul(weighted_NV, w1_NV - w2_NV, 0.5 * half_N1)
        return values_N if infinite_N is None else values_N.masked_fill(infinite_N, torch.inf), slope_NV


def _weights(name: str, s_NV: Tensor, t_NV: Tensor) -> Tensor:
    if name == "uniform":
        some_NV = ~_neither(s_NV, t_NV)
        return some_NV.to(s_NV.dtype) / some_NV.sum(-1, keepdim=True)
    return s_NV.detach().exp() if name == "student" else t_NV.exp()


def _neither(s_NV: Tensor, t_NV: Tensor) -> Tensor:
    """Return where both models exclude an id."""
    return (s_NV == -torch.inf) & (t_NV == -torch.inf)
