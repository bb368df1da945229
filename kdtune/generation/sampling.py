"""The choice of the next tokens. Shape suffixes: B batch, V vocabulary, N tokens drawn among."""

from collections.abc import Sequence

import torch
from torch import Tensor


def sample_tokens(
    logits_BV: Tensor,
    *,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    generators: Sequence[torch.Generator],
) -> list[int]:
    """Each sequence's next id: the most likely at temperature 0, else drawn by :func:`sample_token`.

    Args:
        logits_BV: [B, V], any dtype and device.
        temperature: 0 or more.
        top_k: as there.
        top_p: as there.
        generators: one for each sequence, so that what is drawn for it does not depend on its neighbours.
    """
    if temperature == 0.0:
        chosen: list[int] = logits_BV.argmax(dim=-1).tolist()
        return chosen
    # One transfer for the whole batch.
    logits_BV = logits_BV.to("cpu", torch.float32)
    return [
        sample_token(logits_V, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
        for logits_V, generator in zip(logits_BV, generators, strict=True)
    ]


def sample_token(
    logits_V: Tensor,
    *,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator,
) -> int:
    """The next token's id: the most likely at temperature 0, else drawn from softmax(logits / temperature).

    Args:
        logits_V: [V], any dtype and device.
        temperature: 0 or more.
        top_k: draw among this many most likely tokens; None: among all.
        top_p: draw among the fewest most likely tokens that hold at least this share of the probability left by
            temperature and top_k (nucleus sampling, arXiv 1904.09751); None: among all.
        generator: of the CPU, where the draw happens, so that a seed gives the same tokens on every device.
    """
    if temperature == 0.0:
        return int(logits_V.argmax())
    scaled_V = logits_V.to("cpu", torch.float32) / temperature
    if top_k is None and top_p is None:
        return int(torch.multinomial(scaled_V.softmax(dim=-1), 1, generator=generator))
    # Sorted from the most likely on.
    scaled_N, ids_N = scaled_V.topk(scaled_V.numel() if top_k is None else min(top_k, scaled_V.numel()))
    probabilities_N = scaled_N.softmax(dim=-1)
    if top_p is not None:
        before_N = probabilities_N.cumsum(dim=-1) - probabilities_N
        before_N[0] = 0.0  # the most likely token always stays
        probabilities_N = probabilities_N.masked_fill(before_N >= top_p, 0.0)
    return int(ids_N[torch.multinomial(probabilities_N, 1, generator=generator)])
