"""The Qwen2 (arXiv 2407.10671), Qwen2.5 (2412.15115) and dense Qwen3 (2505.09388) families: as Llama, with biases or norms.

Qwen2 and 2.5 have a bias on queries, keys and values; Qwen3 has a norm on each query and key head instead, and a head size of its
own. Sources of the sizes: the ``config.json`` files released with the weights, of the instruct models where they differ.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kdtune.errors import CheckpointError
from kdtune.models.architecture import Family, TransformerConfig
from kdtune.models.file_configs import (
    FULL_ATTENTION,
    WINDOW_ATTENTION,
    Settings,
    config_from_hf,
    config_to_hf,
    layer_kinds,
    windows_from_hf,
    windows_to_hf,
)
from kdtune.models.llama import GGUF_KEYS, LLAMA

# Heads are padded to 151,936 rows in the small models and 152,064 in the large ones.
_SMALL = TransformerConfig(
    vocab_size=151_936,
    embed_dim=896,
    num_layers=24,
    num_heads=14,
    num_kv_heads=2,
    head_dim=64,
    intermediate_dim=4864,
    max_seq_len=32_768,
    norm_eps=1e-6,
    rope_base=1_000_000.0,
    rope_scaling=None,
    tie_embeddings=True,
    qkv_bias=True,
)
_1_5B = replace(_SMALL, embed_dim=1536, num_layers=28, num_heads=12, head_dim=128, intermediate_dim=8960)
_7B = replace(
    _1_5B,
    vocab_size=152_064,
    embed_dim=3584,
    num_heads=28,
    num_kv_heads=4,
    intermediate_dim=18_944,
    tie_embeddings=False,
)
_LARGE = replace(_7B, embed_dim=5120, num_heads=40, num_kv_heads=8)

_QWEN2_SIZES: dict[str, tuple[str, TransformerConfig]] = {
    "qwen2_0_5b": ("Qwen2 0.5B", _SMALL),
    "qwen2_1_5b": ("Qwen2 1.5B", _1_5B),
    "qwen2_7b": ("Qwen2 7B", _7B),
    "qwen2_5_0_5b": ("Qwen2.5 0.5B", _SMALL),
    "qwen2_5_1_5b": ("Qwen2.5 1.5B", _1_5B),
    "qwen2_5_3b": ("Qwen2.5 3B", replace(_1_5B, embed_dim=2048, num_layers=36, num_heads=16, intermediate_dim=11_008)),
    "qwen2_5_7b": ("Qwen2.5 7B", _7B),
    "qwen2_5_14b": ("Qwen2.5 14B", replace(_LARGE, num_layers=48, intermediate_dim=13_824)),
    "qwen2_5_32b": ("Qwen2.5 32B", replace(_LARGE, num_layers=64, intermediate_dim=27_648)),
    "qwen2_5_72b": (
        "Qwen2.5 72B",
        replace(_LARGE, embed_dim=8192, num_layers=80, num_heads=64, intermediate_dim=29_568),
    ),
}

_0_6B = replace(
    _SMALL,
    embed_dim=1024,
    num_layers=28,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    intermediate_dim=3072,
    max_seq_len=40_960,
    qkv_bias=False,
    qk_norm="head",
)
_8B = replace(_0_6B, embed_dim=4096, num_layers=36, num_heads=32, intermediate_dim=12_288, tie_embeddings=False)

_QWEN3_SIZES: dict[str, tuple[str, TransformerConfig]] = {
    "qwen3_0_6b": ("Qwen3 0.6B", _0_6B),
    "qwen3_1_7b": ("Qwen3 1.7B", replace(_0_6B, embed_dim=2048, intermediate_dim=6144)),
    "qwen3_4b": ("Qwen3 4B", replace(_8B, embed_dim=2560, intermediate_dim=9728, tie_embeddings=True)),
    "qwen3_8b": ("Qwen3 8B", _8B),
    "qwen3_14b": ("Qwen3 14B", replace(_8B, embed_dim=5120, num_layers=40, num_heads=40, intermediate_dim=17_408)),
    "qwen3_32b": ("Qwen3 32B", replace(_8B, embed_dim=5120, num_layers=64, num_heads=64, intermediate_dim=25_600)),
}


def _config_from_hf(family: Family, document: Mapping[str, Any]) -> TransformerConfig:
    found = Settings({**family.hf_defaults, **document}, "config.json")
    kinds, windows = layer_kinds(document), tuple[int | None, ...]()
    if found.flag("use_sliding_window"):
        first, num_layers = found.values["max_window_layers"], found.num_layers()
        if kinds is None and (type(first) is not int or first < 0):
            raise CheckpointError(f"config.json: max_window_layers={first!r}; want an integer from 0")
        kinds = kinds or [FULL_ATTENTION if index < first else WINDOW_ATTENTION for index in range(num_layers)]
        windows = windows_from_hf(family, document, kinds)
    elif WINDOW_ATTENTION in (kinds or ()):
        raise CheckpointError(f"config.json: layer_types with {WINDOW_ATTENTION!r}, and use_sliding_window is not true")
    return config_from_hf(family, document, windows=windows)


def _config_to_hf(family: Family, config: TransformerConfig) -> dict[str, Any]:
    written = config_to_hf(family, config) | {"use_sliding_window": bool(config.windows)}
    if not config.windows:  # then the window's size says nothing
        return written
    # transformers 4 knew only how many layers, the first ones, have none.
    first = next(index for index, window in enumerate(config.windows) if window)
    return written | windows_to_hf(config) | {"max_window_layers": first}


_GGUF = replace(GGUF_KEYS, is_interleaved=False)  # llama.cpp reorders the q and k of Llama alone

QWEN2 = replace(
    LLAMA,
    name="Qwen2",
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    switches={"qkv_bias": True},
    hf_constants={"hidden_act": "silu"},
    hf_defaults={
        "num_key_value_heads": 32,
        "max_position_embeddings": 32_768,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    hf_keys=LLAMA.hf_keys.plus(
        {f"model.layers.{{}}.self_attn.{name}_proj.bias": f"layers.{{}}.attn.{name}_proj.bias" for name in "qkv"}
    ),
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
    gguf_architecture="qwen2",
    gguf_keys=_GGUF.plus({f"blk.{{}}.attn_{name}.bias": f"layers.{{}}.attn.{name}_proj.bias" for name in "qkv"}),
    meta_keys=None,
    config_from_meta=None,
    sizes=_QWEN2_SIZES,
)
QWEN3 = replace(
    QWEN2,
    name="Qwen3",
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    switches={"qk_norm": "head"},
    hf_constants={"hidden_act": "silu", "attention_bias": False},
    hf_defaults={**QWEN2.hf_defaults, "head_dim": 128},
    hf_keys=LLAMA.hf_keys.plus(
        {f"model.layers.{{}}.self_attn.{name}_norm.weight": f"layers.{{}}.attn.{name}_norm.weight" for name in "qk"}
    ),
    gguf_architecture="qwen3",
    gguf_keys=_GGUF.plus(
        {f"blk.{{}}.attn_{name}_norm.weight": f"layers.{{}}.attn.{name}_norm.weight" for name in "qk"}
    ),
    sizes=_QWEN3_SIZES,
)
