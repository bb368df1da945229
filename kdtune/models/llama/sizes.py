"""The published sizes of the Llama family and of SmolLM2, which shares its architecture: one table.

Sources: the ``config.json`` and ``params.json`` files released with the weights.
"""

from dataclasses import replace
from typing import Any

from kdtune.models.rope import RopeScaling
from kdtune.models.transformer import TransformerConfig

LLAMA3_1_ROPE = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192)
LLAMA3_2_ROPE = replace(LLAMA3_1_ROPE, factor=32.0)

_LLAMA2 = TransformerConfig(
    vocab_size=32_000,
    embed_dim=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    intermediate_dim=11_008,
    max_seq_len=4096,
    norm_eps=1e-5,
    rope_base=10_000.0,
    rope_scaling=None,
    tie_embeddings=False,
)
_LLAMA3 = replace(
    _LLAMA2,
    vocab_size=128_256,
    num_kv_heads=8,
    intermediate_dim=14_336,
    max_seq_len=8192,
    rope_base=500_000.0,
)
_LLAMA3_1 = replace(_LLAMA3, max_seq_len=131_072, rope_scaling=LLAMA3_1_ROPE)
_LLAMA3_2 = replace(_LLAMA3_1, rope_scaling=LLAMA3_2_ROPE, tie_embeddings=True)
_WIDE_70B: dict[str, Any] = {
    "embed_dim": 8192,
    "num_layers": 80,
    "num_heads": 64,
    "num_kv_heads": 8,
    "intermediate_dim": 28_672,
}
_SMOLLM2 = replace(
    _LLAMA2,
    vocab_size=49_152,
    embed_dim=2048,
    num_layers=24,
    head_dim=64,
    intermediate_dim=8192,
    max_seq_len=8192,
    rope_base=100_000.0,
    tie_embeddings=True,
)

SIZES: dict[str, TransformerConfig] = {
    "llama2_7b": _LLAMA2,
    "llama2_13b": replace(
        _LLAMA2, embed_dim=5120, num_layers=40, num_heads=40, num_kv_heads=40, intermediate_dim=13_824
    ),
    "llama2_70b": replace(_LLAMA2, **_WIDE_70B),
    "llama3_8b": _LLAMA3,
    "llama3_70b": replace(_LLAMA3, **_WIDE_70B),
    "llama3_1_8b": _LLAMA3_1,
    "llama3_1_70b": replace(_LLAMA3_1, **_WIDE_70B),
    "llama3_1_405b": replace(_LLAMA3_1, embed_dim=16_384, num_layers=126, num_heads=128, intermediate_dim=53_248),
    "llama3_2_1b": replace(_LLAMA3_2, embed_dim=2048, num_layers=16, head_dim=64, intermediate_dim=8192),
    "llama3_2_3b": replace(_LLAMA3_2, embed_dim=3072, num_layers=28, num_heads=24, intermediate_dim=8192),
    "smollm2_135m": replace(_SMOLLM2, embed_dim=576, num_layers=30, num_heads=9, num_kv_heads=3, intermediate_dim=1536),
    "smollm2_360m": replace(
        _SMOLLM2, embed_dim=960, num_layers=32, num_heads=15, num_kv_heads=5, intermediate_dim=2560
    ),
    "smollm2_1_7b": replace(_SMOLLM2, rope_base=130_000.0),
}
