"""Decoders in plain PyTorch, their published sizes, and student initialization by pruning."""

from kdtune.models.kv_cache import KVCache
from kdtune.models.llama.builders import (
    llama,
    llama2_7b,
    llama2_13b,
    llama2_70b,
    llama3_1_8b,
    llama3_1_70b,
    llama3_1_405b,
    llama3_2_1b,
    llama3_2_3b,
    llama3_8b,
    llama3_70b,
    smollm2_1_7b,
    smollm2_135m,
    smollm2_360m,
)
from kdtune.models.rope import RopeScaling
from kdtune.models.transformer import Transformer, TransformerConfig

__all__ = [
    "KVCache",
    "RopeScaling",
    "Transformer",
    "TransformerConfig",
    "llama",
    "llama2_7b",
    "llama2_13b",
    "llama2_70b",
    "llama3_1_8b",
    "llama3_1_70b",
    "llama3_1_405b",
    "llama3_2_1b",
    "llama3_2_3b",
    "llama3_8b",
    "llama3_70b",
    "smollm2_1_7b",
    "smollm2_135m",
    "smollm2_360m",
]
