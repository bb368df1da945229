"""Rotary position embeddings in the half-split layout (RoFormer, arXiv 2104.09864), with Llama 3.1's frequency scaling.

Shape suffixes: B batch, S sequence, H heads, E head dim, R = E / 2 rotated pairs.
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


def inverse_frequencies(head_dim: int, base: float, scaling: RopeScaling | None, device: str = "cpu") -> Tensor:
    """Return the radians per position of each rotated pair, [R], fp32.

    Always on the CPU, so that a model built on the meta device has real values.
    """
    exponents_R = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    inverse_R = 1.0 / base**exponents_R
    return inverse_R if scaling is None else _scale(inverse_R, scaling)


def _scale(inverse_R: Tensor, scaling: RopeScaling) -> Tensor:
    wavelength_R = 2 * math.pi / inverse_R
    turns_R = scaling.original_max_seq_len / wavelength_R
    smooth_R = (turns_R - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth_R = smooth_R.clamp(0.0, 1.0)
    return (1 - smooth_R) * inverse_R / scaling.factor + smooth_R * inverse_R


def rope_tables(positions: Tensor, inverse_R: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of every position, each [S, 1, R] for positions [S] or [B, S, 1, R] for [B, S].

    The angles are fp32 and only the results are rounded to ``dtype``. float64 stays float64.
    """
    wide = torch.promote_types(dtype, torch.float32)
    angles = positions[..., None, None].to(wide) * inverse_R.to(device=positions.device, dtype=wide)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(heads_BSHE: Tensor, rope: tuple[Tensor, ...]) -> Tensor:
    """Rotate each pair (i, i + R) of the queries or keys by its position's angle."""
    cos, sin = rope
    first, second = heads_BSHE.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
