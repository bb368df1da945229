"""The output head, from hidden states to logits. Shapes: T tokens, V vocabulary, D embedding, K inner width."""

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor


class OutputHead(nn.Linear):
    """Linear map from hidden states to logits, without bias, and an optional soft-cap on the logits.

    Call it for logits. A loss that computes them chunk by chunk asks for ``projection`` and ``softcap``, see
    ``kdtune.losses.Head``.
    """

    def __init__(
        self,
        embed_dim: int,
        vocab_size: int,
        *,
        softcap: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(embed_dim, vocab_size, bias=False, device=device)
        self.softcap = softcap

    def forward(self, hidden: Tensor) -> Tensor:
        """Return logits [..., V] for hidden states [..., D]."""
        return soft_capped(super().forward(hidden), self.softcap)

    def projection(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Return [T, K] and [V, K], whose product ``first @ second.T`` is the logits before the soft-cap; here K is D."""
        return hidden_TD, self.weight

    def projection_problem(self) -> str | None:
        """Return what keeps ``projection`` from being two plain matrices, such as a quantized weight; None if nothing does."""
        return None if is_plain(self.weight) else f"has a weight that is a {type(self.weight).__name__}"


def soft_capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Return ``softcap * tanh(logits / softcap)`` (Gemma 2, arXiv 2408.00118); the logits themselves for None."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def is_plain(weight: Tensor) -> bool:
    """Return whether the weight, or this process's shard of it, is plain numbers, not one of torchao's tensors."""
    return type(weight) in (Tensor, nn.Parameter, DTensor, FakeTensor)
