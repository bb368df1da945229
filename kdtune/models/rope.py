"""Rotary position embeddings in the half-split layout (RoFormer, arXiv 2104.09864), and the ways to scale their frequencies.

Shape suffixes: B batch, S sequence, T tokens of documents, H heads, E head dim, R = half of the rotated part of a head.
The angles are always computed in fp32: bf16 cannot tell neighbouring positions apart beyond 256.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RopeScaling:
    """Frequency scaling by which Llama 3.1 and later extend the context beyond the length of their first training.

    Wavelengths longer than ``original_max_seq_len / low_freq_factor`` are divided by ``factor``, those shorter than
    ``original_max_seq_len / high_freq_factor`` are unchanged, those between are interpolated.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_seq_len: int


@dataclass(frozen=True)
class LinearRope:
    """Every frequency is divided by ``factor`` (position interpolation, arXiv 2306.15595)."""

    factor: float


@dataclass(frozen=True)
class LongRope:
    """Each frequency is divided by a factor of its own (LongRoPE, arXiv 2402.13753).

    The divisors of a text of up to ``original_max_seq_len`` tokens are ``short_factors``, those of a longer one, for all of its
    tokens, ``long_factors``: one for each rotated pair. Cosines and sines are multiplied by ``attention_factor``.
    """

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_max_seq_len: int
    attention_factor: float


@dataclass(frozen=True)
class YarnRope:
    """Low frequencies are divided by ``factor``, high ones stay, those between are interpolated (YaRN, arXiv 2309.00071).

    A frequency is high from ``beta_fast`` turns in ``original_max_seq_len`` tokens on, and low up to ``beta_slow``; with ``truncates``
    the bounds are rounded outwards to whole pairs. Cosines and sines are multiplied by ``attention_factor``.
    """

    factor: float
    original_max_seq_len: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncates: bool = True


AnyScaling = RopeScaling | LinearRope | LongRope | YarnRope


def inverse_frequencies(rotary_dim: int, base: float, scaling: AnyScaling | None, device: str = "cpu") -> Tensor:
    """Return the radians per position of each rotated pair, [R], fp32; of `LongRope` [2, R], those of short and of long texts.

    Always on the CPU, so that a model built on the meta device has real values.
    """
    exponents_R = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=device) / rotary_dim
    periods_R = base**exponents_R
    if isinstance(scaling, LongRope):
        factors_2R = torch.tensor([scaling.short_factors, scaling.long_factors], dtype=torch.float32, device=device)
        return 1.0 / (factors_2R * periods_R)
    inverse_R = 1.0 / periods_R
    if isinstance(scaling, YarnRope):
        return _between(inverse_R, 1.0 / (scaling.factor * periods_R), _pairs_between(rotary_dim, base, scaling))
    if isinstance(scaling, LinearRope):
        return inverse_R / scaling.factor
    return inverse_R if scaling is None else _scale(inverse_R, scaling)


def _scale(inverse_R: Tensor, scaling: RopeScaling) -> Tensor:
    wavelength_R = 2 * math.pi / inverse_R
    turns_R = scaling.original_max_seq_len / wavelength_R
    smooth_R = (turns_R - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth_R = smooth_R.clamp(0.0, 1.0)
    return (1 - smooth_R) * inverse_R / scaling.factor + smooth_R * inverse_R


def _pairs_between(rotary_dim: int, base: float, scaling: YarnRope) -> tuple[float, float]:
    """Return the pair up to which frequencies are high, and the one from which they are low."""

    def pair(turns: float) -> float:
        return rotary_dim * math.log(scaling.original_max_seq_len / (turns * 2 * math.pi)) / (2 * math.log(base))

    high, low = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncates:
        high, low = math.floor(high), math.ceil(low)
    high, low = max(high, 0), min(low, rotary_dim - 1)
    return high, low + 0.001 if low == high else low  # no division by 0


def _between(high_R: Tensor, low_R: Tensor, pairs: tuple[float, float]) -> Tensor:
    first, last = pairs
    share_R = 1 - (
        (torch.arange(len(high_R), dtype=torch.float32, device=high_R.device) - first) / (last - first)
    ).clamp(0, 1)
    return low_R * (1 - share_R) + high_R * share_R


def long_rope_frequencies(inverse_2R: Tensor, lengths: Tensor, original_max_seq_len: int) -> Tensor:
    """Return the frequencies [..., R] of texts of these lengths [...]: those of `LongRope`'s short or of its long texts.

    The choice is made on the device: the host does not wait for a length.
    """
    return inverse_2R.to(device=lengths.device)[(lengths > original_max_seq_len).long()]


def rope_tables(
    positions: Tensor, inverse: Tensor, dtype: torch.dtype, *, factor: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of every position, each [S, 1, R] for positions [S] or [B, S, 1, R] for [B, S], times ``factor``.

    ``inverse`` is [R] for all positions, or [..., R] with dimensions that broadcast to theirs. The angles are fp32 and only the
    results are rounded to ``dtype``. float64 stays float64.
    """
    wide = torch.promote_types(dtype, torch.float32)
    angles = positions[..., None, None].to(wide) * inverse.to(device=positions.device, dtype=wide)[..., None, :]
    cos, sin = angles.cos(), angles.sin()
    return (cos.to(dtype), sin.to(dtype)) if factor == 1.0 else ((cos * factor).to(dtype), (sin * factor).to(dtype))


def rotate(heads_BSHE: Tensor, rope: tuple[Tensor, ...]) -> Tensor:
    """Rotate each pair (i, i + R) of the queries or keys by its position's angle; what is beyond the pairs stays."""
    cos, sin = rope
    rotated_dim = 2 * cos.shape[-1]
    first, second = heads_BSHE[..., :rotated_dim].chunk(2, dim=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    rest = () if rotated_dim == heads_BSHE.shape[-1] else (heads_BSHE[..., rotated_dim:],)
    return torch.cat((*turned, *rest), dim=-1)
