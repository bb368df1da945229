"""What all divergences here share: temperature, dtype, and a gradient by formula beside a value that autograd can follow.

Shapes: N tokens, V ids of the vocabulary. s and t are the natural log-probabilities of student and teacher, [N, V]; each row
is normalized. q = exp(s) and p = exp(t). -inf is an id without probability: its term is exactly the limit, 0 or +inf, not NaN.

"Slope" is the partial derivative with respect to s, every entry of s taken for a free variable. The fused loss goes from
there to the logits z: the gradient is g - q * sum(g), divided by the temperature.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from kdtune.errors import ConfigError

# Ids per part of `most_likely`'s first pass.
_PART = 8192

TargetKind = Literal["tail", "sampled", "renormalized", "ignored"]
"""What a loss sees of a teacher's distribution: its top k ids and a bucket for the rest; ids drawn from it; the top k, with the student's
probability of others to be unlearned, or ignored."""


class TemperedDivergence:
    """Base class: a divergence of softmax(logits / temperature) of both models, by the `compare` of a subclass.

    Args:
        temperature: of both distributions. 1: unchanged.
        scale_by_temperature_squared: multiply value and gradient by temperature squared, as arXiv 1503.02531 does to keep
            the gradient's size when the temperature changes. False: the divergence itself.
    """

    label = "divergence"
    """Name in tables and plots."""

    def __init__(self, temperature: float = 1.0, scale_by_temperature_squared: bool = False) -> None:
        self.temperature = check_temperature(temperature)
        self.scale_by_temperature_squared = scale_by_temperature_squared

    @property
    def name(self) -> str:
        """Display name in tables and plots."""
        squared = ", times T²" if self.scale_by_temperature_squared else ""
        return self.label if self.temperature == 1 else f"{self.label} (T={self.temperature:g}{squared})"

    @property
    def factor(self) -> float:
        """What the value at the temperature is multiplied by: 1, or the temperature squared."""
        return self.temperature**2 if self.scale_by_temperature_squared else 1.0

    def compare(self, s_NV: Tensor, t_NV: Tensor) -> tuple[Tensor, Tensor]:
        """Return value [N], which autograd can differentiate, and slope [N, V], at temperature 1."""
        raise NotImplementedError

    def target_problem(self, kind: TargetKind) -> str | None:
        """Return why the divergence is not defined on sparse targets of a kind; None if it is."""
        if self.temperature != 1:
            return f"temperature={self.temperature:g} needs all of the teacher's probabilities; set 1"
        return f"{type(self).__name__} needs the probability of each id"

    def __call__(self, student_logp_NV: Tensor, teacher_logp_NV: Tensor) -> Tensor:
        """Return the divergence of each token, [N], in fp32 or wider, from natural log-probabilities."""
        values_N, _ = self.compare(*tempered(self.temperature, *raised(student_logp_NV, teacher_logp_NV)))
        return values_N if self.factor == 1 else values_N * self.factor

    @torch.no_grad()
    def value_and_gradient(self, student_logp_NV: Tensor, teacher_logp_NV: Tensor) -> tuple[Tensor, Tensor]:
        """Return what a call returns, and its partial derivatives with respect to student_logp_NV, by formula."""
        s_NV, t_NV = tempered(self.temperature, *raised(student_logp_NV, teacher_logp_NV))
        values_N, slope_NV = self.compare(s_NV, t_NV)
        if self.temperature != 1:
            slope_NV = (slope_NV - s_NV.exp() * slope_NV.sum(-1, keepdim=True)) * (self.factor / self.temperature)
        return values_N if self.factor == 1 else values_N * self.factor, slope_NV


class SumOverIds(TemperedDivergence):
    """A divergence that is a sum of one term per id, so that it can be estimated without bias from ids that are drawn."""

    lower_bound_on_tail = True
    """Merging ids into one never makes it larger, as for every f-divergence: it is defined on top-k targets with a tail."""

    def terms(self, s_NV: Tensor, t_NV: Tensor) -> tuple[Tensor, Tensor]:
        """Return the terms, which autograd can differentiate, and their slopes, both [N, V], at temperature 1."""
        raise NotImplementedError

    def compare(self, s_NV: Tensor, t_NV: Tensor) -> tuple[Tensor, Tensor]:
        """Return value [N] and slope [N, V], at temperature 1."""
        terms_NV, slopes_NV = self.terms(s_NV, t_NV)
        return terms_NV.sum(-1), slopes_NV

    def target_problem(self, kind: TargetKind) -> str | None:
        """Return why the divergence is not defined on sparse targets of a kind; None if it is."""
        if self.temperature != 1 or (kind == "tail" and not self.lower_bound_on_tail):
            return super().target_problem(kind)
        return None


def check_temperature(temperature: float) -> float:
    """Return the temperature if it is valid.

    Raises:
        ConfigError: it is not a finite number above 0.
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise ConfigError(
            f"temperature={temperature}: must be a number above 0; 1 leaves the distributions as they are"
        )
    return temperature


def check_range(name: str, value: float, allowed: Callable[[float], bool], description: str) -> float:
    """Return a setting if it is a finite number that is allowed.

    Raises:
        ConfigError: it is not; the message has the description.
    """
    if not (math.isfinite(value) and allowed(value)):
        raise ConfigError(f"{name}={value}: must be {description}")
    return value


def tempered(temperature: float, *logp: Tensor) -> tuple[Tensor, ...]:
    """Return the log-probabilities [N, V] at a temperature; at 1 the tensors themselves.

    A softmax ignores a shift of its logits, so log-probabilities / T give the same result as logits / T.
    """
    if temperature == 1:
        return logp
    return tuple(_log_softmax(one / temperature) for one in logp)


def _log_softmax(logits: Tensor) -> Tensor:
    # torch's own adds one number after the other on a CPU: with 128,256 ids the gradient at temperature 0.5 was off by 3.5e-5.
    below = logits - logits.detach().amax(-1, keepdim=True)
    return below - below.exp().sum(-1, keepdim=True).log()


def raised(*logp: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors in one dtype, fp32 or wider."""
    dtype = torch.float32
    for one in logp:
        dtype = torch.promote_types(dtype, one.dtype)
    return tuple(one.to(dtype) for one in logp)


def times(weight: Tensor, factor: Tensor) -> Tensor:
    """Return weight * factor, 0 where the weight is 0, whatever the factor is.

    Masked before the product where 0 * inf would be NaN, in the value and in its gradient.
    """
    product = weight * factor
    return product if is_within(product) else weight * factor.masked_fill(weight == 0, 0.0)


def zero_outside(x_NV: Tensor, s_NV: Tensor) -> Tensor:
    """Return x, 0 where the log-probability s is -inf."""
    return x_NV if is_within(s_NV) else x_NV.masked_fill(s_NV == -torch.inf, 0.0)


def is_within(x: Tensor, limit: float = torch.finfo(torch.float32).max) -> bool:
    """Return whether all entries are known to be from -limit to limit, none NaN: then a formula needs no masks.

    A mask takes a CPU ten times as long as this question. Elsewhere it is not asked, for the host would wait for the answer, nor
    in compiled code, where a mask is nearly free and a branch is not.
    """
    has_values = x.device.type == "cpu" and not x.is_meta and not isinstance(x, FakeTensor)
    if not has_values or torch.compiler.is_compiling() or x.numel() == 0:
        return False
    smallest, largest = x.detach().aminmax()
    return bool(smallest >= -limit) and bool(largest <= limit)


def most_likely(logits_RV: Tensor) -> Tensor:
    """Return `argmax(-1)`, on a CPU from the largest value of a row or of its parts, which takes a fraction of argmax's time."""
    num_ids = logits_RV.shape[1]
    num_parts = num_ids // _PART
    if logits_RV.device.type != "cpu" or num_parts < 2:
        return logits_RV.argmax(-1)
    if torch.compiler.is_compiling():
        return first_id(logits_RV == logits_RV.amax(-1, keepdim=True))
    # The first of several largest values lies in the first part that has one.
    parts = logits_RV.split(_PART, dim=1)
    start_R1 = torch.stack([part.amax(-1) for part in parts], dim=1).argmax(-1, keepdim=True) * _PART
    ids_RP = (start_R1 + torch.arange(_PART, device=start_R1.device)).clamp_(max=logits_RV.shape[1] - 1)
    return start_R1.squeeze(1) + logits_RV.gather(1, ids_RP).argmax(-1)


def first_id(is_there_RV: Tensor) -> Tensor:
    """Return each row's first id that is there, int64 [R], the last one if none is; compiled for a CPU, vectorized, unlike argmax."""
    num_ids = is_there_RV.shape[1]
    ids_V = torch.arange(num_ids, dtype=torch.int32, device=is_there_RV.device)
    return ids_V.where(is_there_RV, num_ids - 1).amin(-1).long()


def ascending(x_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sorted rows of non-negative numbers, and their order.

    On a CPU torch sorts a row of int32 by radix, ten times as fast as one of fp32 (128,256 ids: 1.1 and 10.4 ms), and
    non-negative floating-point numbers are ordered as the integers of the same bits.
    """
    is_plain = x_NV.device.type != "cpu" or x_NV.dtype != torch.float32 or len(x_NV) == 0
    if is_plain:
        return x_NV.sort(dim=-1)
    rows = [row.sort(stable=True) for row in x_NV.contiguous().view(torch.int32)]
    values, order = (torch.stack([row[i] for row in rows]) for i in (0, 1))
    return values.view(torch.float32), order


def log_ratios_to_mixture(s_NV: Tensor, t_NV: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """Return s - m and t - m for the log m of the mixture weight * p + (1 - weight) * q, 0 < weight < 1.

    Exact to rounding where the two are close: s - m is about weight * (s - t), of which subtraction would leave few digits.
    An id without probability on a side has 0 on that side; the other side has its limit.
    """
    if weight > 0.5:
        t_ratio_NV, s_ratio_NV = log_ratios_to_mixture(t_NV, s_NV, 1 - weight)
        return s_ratio_NV, t_ratio_NV
    # log(m / q) = log(1 + weight * (exp(d) - 1)) with d = t - s; beyond 80 it grows by 1 for 1, and exp would overflow.
    d_NV = t_NV - s_NV
    if is_within(d_NV, 80.0):
        m_minus_s_NV = (weight * d_NV.expm1()).log1p()
        return -m_minus_s_NV, d_NV - m_minus_s_NV
    no_s_NV, no_t_NV = s_NV == -torch.inf, t_NV == -torch.inf
    d_NV = d_NV.masked_fill(no_s_NV | no_t_NV, 0.0)
    m_minus_s_NV = (weight * d_NV.clamp(max=80.0).expm1()).log1p() + (d_NV - 80.0).clamp(min=0.0)
    s_ratio_NV = (-m_minus_s_NV).masked_fill(no_t_NV, -math.log1p(-weight))
    t_ratio_NV = (d_NV - m_minus_s_NV).masked_fill(no_s_NV, -math.log(weight))
    return s_ratio_NV.masked_fill(no_s_NV, 0.0), t_ratio_NV.masked_fill(no_t_NV, 0.0)
