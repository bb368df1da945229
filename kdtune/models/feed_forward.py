"""SwiGLU feed-forward (arXiv 2002.05202). Shape suffixes: B batch, S sequence, D embedding, F feed-forward."""

from torch import Tensor, nn
from torch.nn import functional


class FeedForward(nn.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))``, without biases."""

    def __init__(self, embed_dim: int, intermediate_dim: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(embed_dim, intermediate_dim, bias=False)
        self.up_proj = nn.Linear(embed_dim, intermediate_dim, bias=False)
        self.down_proj = nn.Linear(intermediate_dim, embed_dim, bias=False)

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        """Map [B, S, D] to [B, S, D]."""
        inner_BSF = functional.silu(self.gate_proj(hidden_BSD)) * self.up_proj(hidden_BSD)
        return self.down_proj(inner_BSF)
