"""Builders of the published sizes, with random weights, on the current default device and dtype."""

from kdtune.models.llama.sizes import SIZES
from kdtune.models.rope import RopeScaling
from kdtune.models.transformer import Transformer, TransformerConfig


def llama(
    *,
    vocab_size: int,
    embed_dim: int,
    num_layers: int,
    num_heads: int,
    intermediate_dim: int,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    max_seq_len: int = 8192,
    norm_eps: float = 1e-5,
    rope_base: float = 500_000.0,
    rope_scaling: RopeScaling | None = None,
    tie_embeddings: bool = False,
) -> Transformer:
    """Build a Llama of any size, with random weights.

    Args:
        vocab_size: rows of the embedding and of the head.
        embed_dim: width of the residual stream.
        num_layers: decoder layers.
        num_heads: query heads.
        intermediate_dim: width inside the feed-forward.
        num_kv_heads: key and value heads; None: as many as query heads.
        head_dim: width of a head; None: ``embed_dim / num_heads``.
        max_seq_len: the context, in tokens.
        norm_eps: epsilon of the RMS norms.
        rope_base: theta of the rotary embedding.
        rope_scaling: Llama 3.1's frequency scaling for a longer context; None: no scaling.
        tie_embeddings: the head is the embedding.
    """
    config = TransformerConfig(
        vocab_size=vocab_size,
        embed_dim=embed_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads if num_kv_heads is None else num_kv_heads,
        head_dim=embed_dim // num_heads if head_dim is None else head_dim,
        intermediate_dim=intermediate_dim,
        max_seq_len=max_seq_len,
        norm_eps=norm_eps,
        rope_base=rope_base,
        rope_scaling=rope_scaling,
        tie_embeddings=tie_embeddings,
    )
    return Transformer(config)


def llama2_7b() -> Transformer:
    """Llama 2 7B: 6,738,415,616 parameters."""
    return Transformer(SIZES["llama2_7b"])


def llama2_13b() -> Transformer:
    """Llama 2 13B: 13,015,864,320 parameters."""
    return Transformer(SIZES["llama2_13b"])


def llama2_70b() -> Transformer:
    """Llama 2 70B: 68,976,648,192 parameters."""
    return Transformer(SIZES["llama2_70b"])


def llama3_8b() -> Transformer:
    """Llama 3 8B: 8,030,261,248 parameters, 8k context."""
    return Transformer(SIZES["llama3_8b"])


def llama3_70b() -> Transformer:
    """Llama 3 70B: 70,553,706,496 parameters, 8k context."""
    return Transformer(SIZES["llama3_70b"])


def llama3_1_8b() -> Transformer:
    """Llama 3.1 8B: 8,030,261,248 parameters, 128k context."""
    return Transformer(SIZES["llama3_1_8b"])


def llama3_1_70b() -> Transformer:
    """Llama 3.1 70B, and 3.3 70B: 70,553,706,496 parameters."""
    return Transformer(SIZES["llama3_1_70b"])


def llama3_1_405b() -> Transformer:
    """Llama 3.1 405B: 405,853,388,800 parameters."""
    return Transformer(SIZES["llama3_1_405b"])


def llama3_2_1b() -> Transformer:
    """Llama 3.2 1B: 1,235,814,400 parameters, tied head."""
    return Transformer(SIZES["llama3_2_1b"])


def llama3_2_3b() -> Transformer:
    """Llama 3.2 3B: 3,212,749,824 parameters, tied head."""
    return Transformer(SIZES["llama3_2_3b"])


def smollm2_135m() -> Transformer:
    """SmolLM2 135M: 134,515,008 parameters, tied head."""
    return Transformer(SIZES["smollm2_135m"])


def smollm2_360m() -> Transformer:
    """SmolLM2 360M: 361,821,120 parameters, tied head."""
    return Transformer(SIZES["smollm2_360m"])


def smollm2_1_7b() -> Transformer:
    """SmolLM2 1.7B: 1,711,376,384 parameters, tied head."""
    return Transformer(SIZES["smollm2_1_7b"])
