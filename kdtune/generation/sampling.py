"""The choice of one token. Shape suffix: V vocabulary."""

import torch
from torch import Tensor


def sample_token(logits_V: Tensor, *, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    """The next token's id: the most likely at temperature 0, else drawn from softmax(logits / temperature).

    Args:
        logits_V: [V], any dtype and device.
        temperature: 0 or more.
        top_k: draw among this many most likely tokens; None: among all.
        generator: of the CPU, where the draw happens, so that a seed gives the same tokens on every device.
    """
    if temperature == 0.0:
        return int(logits_V.argmax())
    scaled_V = logits_V.to("cpu", torch.float32) / temperature
    if top_k is not None and top_k < scaled_V.numel():
        scaled_V = scaled_V.masked_fill(scaled_V < scaled_V.topk(top_k).values[-1], -torch.inf)
    return int(torch.multinomial(scaled_V.softmax(dim=-1), 1, generator=generator))
