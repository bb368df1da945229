"""Sample the next tokens. Shape suffixes: B batch, V vocabulary, N candidate tokens, 1 one."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from kdtune.errors import CheckpointError, ConfigError

# Below it a temperature would be 0 in fp32; what is drawn is the most likely token long before.
_LEAST_TEMPERATURE = torch.finfo(torch.float32).tiny
# Ids whose probabilities are summed before a draw looks at each of them.
_BLOCK = 128


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

    Every draw takes one number of the sequence's own generator, on the CPU, so that it depends neither on its neighbours nor, up to
    rounding, on the device.

    Args:
        logits_BV: [B, V], any dtype and device.
        sampling: how it is chosen.
        generators: a CPU generator per sequence, unused where the most likely id is taken.

    Raises:
        CheckpointError: logits that are not finite.
    """
    if sampling.temperature == 0.0:
        best_B1, ids_B1 = logits_BV.max(dim=-1, keepdim=True)
        _check_finite(best_B1)
    else:
        best_B1 = logits_BV.amax(dim=-1, keepdim=True)
        _check_finite(best_B1)
        uniforms = [torch.rand((), generator=each, dtype=torch.float64) for each in generators]
        # One transfer for the whole batch.
        logits_BV = logits_BV.to("cpu", torch.promote_types(logits_BV.dtype, torch.float32))
        # From the largest down, so that no temperature makes one of them infinite.
        scaled_BV = logits_BV - best_B1.to(logits_BV)
        if sampling.temperature != 1.0:
            scaled_BV /= max(sampling.temperature, _LEAST_TEMPERATURE)
        ids_B1 = _drawn(scaled_BV, sampling, torch.stack(uniforms)[:, None])
    chosen: list[int] = ids_B1[:, 0].tolist()
    return chosen


def sample_token(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Return the next token's id, from `logits_V` [V] of any dtype and device, with a CPU generator, see `sample_tokens`.

    Raises:
        CheckpointError: logits that are not finite.
    """
    return sample_tokens(logits_V[None], sampling, [generator])[0]


def _drawn(scaled_BV: Tensor, sampling: Sampling, uniforms_B1: Tensor) -> Tensor:
    """Return ids [B, 1]: where the cumulative probabilities of those that are not filtered out reach a uniform number of [0, 1)."""
    top_k, top_p = sampling.top_k, sampling.top_p if sampling.top_p != 1.0 else None
    if top_k is None and top_p is None:
        return _reached_of_all(scaled_BV.exp(), uniforms_B1)
    vocab_size = scaled_BV.shape[-1]
    # Sorted from the most likely on.
    scaled_BN, ids_BN = scaled_BV.topk(vocab_size if top_k is None else min(top_k, vocab_size))
    probabilities_BN = scaled_BN.softmax(dim=-1)
    if top_p is not None:
        before_BN = probabilities_BN.cumsum(dim=-1, dtype=torch.float64) - probabilities_BN
        is_left_out_BN = before_BN >= top_p
        is_left_out_BN[:, 0] = False  # the most likely token always stays
        probabilities_BN = probabilities_BN.masked_fill(is_left_out_BN, 0.0)
    return ids_BN.gather(1, _reached(probabilities_BN, uniforms_B1))


def _reached(weights_BN: Tensor, shares_B1: Tensor) -> Tensor:
    """Return the first index [B, 1] up to which more than this share of the weights lies."""
    return _first_above(weights_BN.cumsum(dim=-1, dtype=torch.float64), shares_B1)


def _first_above(sums_BN: Tensor, shares_B1: Tensor) -> Tensor:
    totals_B1 = sums_BN[:, -1:]
    # Below the total also where the product is rounded up: an index is found, and its weight is not 0.
    wanted_B1 = torch.minimum(shares_B1 * totals_B1, totals_B1.nextafter(torch.zeros_like(totals_B1)))
    return torch.searchsorted(sums_BN, wanted_B1, right=True)


def _reached_of_all(weights_BV: Tensor, shares_B1: Tensor) -> Tensor:
    """Return the same of a whole vocabulary: first the block of ids, then the id in it, a sixth of the time of all sums."""
    blocks_BKN = functional.pad(weights_BV, (0, -weights_BV.shape[1] % _BLOCK)).unflatten(1, (-1, _BLOCK))
    sums_BK = blocks_BKN.sum(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    block_B1 = _first_above(sums_BK, shares_B1)
    before_B1 = torch.where(block_B1 > 0, sums_BK.gather(1, (block_B1 - 1).clamp(min=0)), 0.0)
    inner_B1 = (shares_B1 * sums_BK[:, -1:] - before_B1) / (sums_BK.gather(1, block_B1) - before_B1)
    block_BN = blocks_BKN.take_along_dim(block_B1[:, :, None], dim=1)[:, 0]
    return block_B1 * _BLOCK + _reached(block_BN, inner_B1.clamp(0.0, 1.0))


def _check_finite(best: Tensor) -> None:
    """Raise if one of the sequences' largest logits, NaN if any logit is NaN, is not finite."""
    if not best.isfinite().all():
        value = best[~best.isfinite()][0]
        raise CheckpointError(
            f"the model's logits are not numbers (found {value.item()}): its weights hold NaN or infinity, or their dtype is "
            "too narrow for it; check where the weights come from, or try dtype=fp32"
        )
