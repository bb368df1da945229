"""Sample the next tokens. Shape suffixes: B batch, V vocabulary, N candidate tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdtune.errors import CheckpointError, ConfigError

# Below it a temperature would be 0 in fp32; what is drawn is the most likely token long before.
_LEAST_TEMPERATURE = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the most likely one, or drawn from softmax(logits / temperature).

    Raises:
        ConfigError: a number is out of range.
    """

    temperature: float = 0.0
    """0 takes the most likely token."""
    top_k: int | None = None
    """Sample from this many most likely tokens; None: from all."""
    top_p: float | None = None
    """Sample from the fewest most likely tokens that hold at least this share of the probability left by temperature and
    top_k (nucleus sampling, arXiv 1904.09751); None: from all."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature={self.temperature}: must be 0 (the most likely token) or more")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k={self.top_k}: must be 1 or more, or null for the whole vocabulary")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p={self.top_p}: must be above 0 and at most 1, or null for the whole vocabulary")


GREEDY = Sampling()


def sample_tokens(logits_BV: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> list[int]:
    """Return each sequence's next id.

    Args:
        logits_BV: [B, V], any dtype and device.
        sampling: how it is chosen.
        generators: one per sequence, so that its draws do not depend on its neighbours.

    Raises:
        CheckpointError: logits that are not finite.
    """
    if sampling.temperature == 0.0:
        best_B, ids_B = logits_BV.max(dim=-1)
        _check_finite(best_B)
        chosen: list[int] = ids_B.tolist()
        return chosen
    # One transfer for the whole batch.
    logits_BV = logits_BV.to("cpu", torch.float32)
    return [
        sample_token(logits_V, sampling, generator) for logits_V, generator in zip(logits_BV, generators, strict=True)
    ]


def sample_token(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Return the next token's id, from `logits_V` [V] of any dtype and device.

    `generator` is a CPU generator: sampling happens on the CPU, so that a seed gives the same tokens on every device.

    Raises:
        CheckpointError: logits that are not finite.
    """
    top_k, top_p = sampling.top_k, sampling.top_p
    best, best_id = logits_V.to("cpu", torch.float32).max(dim=-1)
    _check_finite(best)
    if sampling.temperature == 0.0:
        return int(best_id)
    # From the largest down, so that no temperature makes one of them infinite.
    scaled_V = (logits_V.to("cpu", torch.float32) - best) / max(sampling.temperature, _LEAST_TEMPERATURE)
    if top_k is None and top_p is None:
        return int(torch.multinomial(scaled_V.softmax(dim=-1), 1, generator=generator))
    # Sorted from the most likely on.
    scaled_N, ids_N = scaled_V.topk(scaled_V.numel() if top_k is None else min(top_k, scaled_V.numel()))
    probabilities_N = scaled_N.softmax(dim=-1)
    if top_p is not None:
        before_N = probabilities_N.cumsum(dim=-1) - probabilities_N
        is_left_out_N = before_N >= top_p
        is_left_out_N[0] = False  # the most likely token always stays
        probabilities_N = probabilities_N.masked_fill(is_left_out_N, 0.0)
    return int(ids_N[torch.multinomial(probabilities_N, 1, generator=generator)])


def _check_finite(best: Tensor) -> None:
    """Return each sequence's largest logit, NaN if any of them is NaN."""
    if not best.isfinite().all():
        value = best[~best.isfinite()][0] if best.ndim else best
        raise CheckpointError(
            f"the model's logits are not numbers (found {value.item()}): its weights hold NaN or infinity, or their dtype is "
            "too narrow for it; check where the weights come from, or try dtype=fp32"
        )
