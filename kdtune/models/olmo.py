"""The OLMo 2 (arXiv 2501.00656) and OLMo 3 families: norms after attention and feed-forward, and over all query or key heads.

Three of four layers of OLMo 3 have a window; YaRN scales the frequencies of the others alone. Sources of the sizes: the
``config.json`` files released with the weights.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

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
from kdtune.models.rope import YarnRope
from kdtune.models.rope_settings import kinds_to_hf, rope_of_kinds

_7B = TransformerConfig(
    vocab_size=100_352,
    embed_dim=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    intermediate_dim=11_008,
    max_seq_len=4096,
    norm_eps=1e-6,
    rope_base=500_000.0,
    rope_scaling=None,
    tie_embeddings=False,
    qk_norm="projection",
    norm_placement="after",
    norm_rounds_last=True,
)
_WIDE = replace(_7B, embed_dim=5120, num_heads=40, num_kv_heads=8)

OLMO2 = replace(
    LLAMA,
    name="OLMo 2",
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    switches={"qk_norm": "projection", "norm_placement": "after", "norm_rounds_last": True},
    hf_constants={"hidden_act": "silu", "attention_bias": False},
    hf_defaults={"rms_norm_eps": 1e-5},
    hf_keys=LLAMA.hf_keys.without("layers.{}.attn_norm.weight", "layers.{}.mlp_norm.weight").plus(
        {
            "model.layers.{}.post_attention_layernorm.weight": "layers.{}.attn_post_norm.weight",
            "model.layers.{}.post_feedforward_layernorm.weight": "layers.{}.mlp_post_norm.weight",
            **{
                f"model.layers.{{}}.self_attn.{name}_norm.weight": f"layers.{{}}.attn.{name}_norm.weight"
                for name in "qk"
            },
        }
    ),
    gguf_architecture="olmo2",
    gguf_keys=replace(
        GGUF_KEYS.without("layers.{}.attn_norm.weight", "layers.{}.mlp_norm.weight").plus(
            {
                "blk.{}.post_attention_norm.weight": "layers.{}.attn_post_norm.weight",
                "blk.{}.post_ffw_norm.weight": "layers.{}.mlp_post_norm.weight",
                **{f"blk.{{}}.attn_{name}_norm.weight": f"layers.{{}}.attn.{name}_norm.weight" for name in "qk"},
            }
        ),
        is_interleaved=False,
    ),
    meta_keys=None,
    config_from_meta=None,
    sizes={
        "olmo2_1b": (
            "OLMo 2 1B",
            replace(_7B, embed_dim=2048, num_layers=16, num_heads=16, num_kv_heads=16, intermediate_dim=8192),
        ),
        "olmo2_7b": ("OLMo 2 7B", _7B),
        "olmo2_13b": ("OLMo 2 13B", replace(_WIDE, num_layers=40, num_kv_heads=40, intermediate_dim=13_824)),
        "olmo2_32b": ("OLMo 2 32B", replace(_WIDE, num_layers=64, intermediate_dim=27_648)),
    },
)


def _pattern(num_layers: int) -> list[str]:
    return [WINDOW_ATTENTION if (index + 1) % 4 else FULL_ATTENTION for index in range(num_layers)]


def _config_from_hf(family: Family, document: Mapping[str, Any]) -> TransformerConfig:
    found = Settings({**family.hf_defaults, **document}, "config.json")
    flat, base = rope_of_kinds(document, found.size("rope_theta", kind=float))
    kinds = layer_kinds(document) or _pattern(found.num_layers())
    return config_from_hf(family, flat, windows=windows_from_hf(family, document, kinds), window_rope_base=base)


def _config_to_hf(family: Family, config: TransformerConfig) -> dict[str, Any]:
    written = config_to_hf(family, config) | windows_to_hf(config)
    base = config.rope_base if config.window_rope_base is None else config.window_rope_base
    kinds = written["layer_types"] or [FULL_ATTENTION] * config.num_layers
    return written | {"layer_types": kinds, **kinds_to_hf(written, base)}


def _olmo3_size(like: TransformerConfig) -> TransformerConfig:
    windows = tuple(4096 if kind == WINDOW_ATTENTION else None for kind in _pattern(like.num_layers))
    return replace(
        like,
        vocab_size=100_278,
        max_seq_len=65_536,
        windows=windows,
        window_rope_base=like.rope_base,
        rope_scaling=YarnRope(8.0, 8192, 1.2079441541679836),
    )


OLMO3 = replace(
    OLMO2,
    name="OLMo 3",
    model_type="olmo3",
    architecture="Olmo3ForCausalLM",
    hf_defaults={"rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "sliding_window": 4096},
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
    gguf_architecture=None,
    gguf_keys=None,
    sizes={
        "olmo3_7b": ("OLMo 3 7B", _olmo3_size(_7B)),
        "olmo3_32b": ("OLMo 3 32B", _olmo3_size(replace(_WIDE, num_layers=64, intermediate_dim=27_648))),
    },
)
