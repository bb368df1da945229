"""The Gemma 2 (arXiv 2408.00118) and Gemma 3 (text, arXiv 2503.19786) families: norms before and after each block.

Gains are 1 + weight, embeddings are multiplied by the square root of their size, the feed-forward is a GeGLU. Every second layer of
Gemma 2 has a window, and scores and logits are bounded; five of six layers of Gemma 3 have one, and are rotated by a base of their
own. Sources of the sizes: the ``config.json`` files released with the weights.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kdtune.models.architecture import Family, TransformerConfig
from kdtune.models.file_configs import (
    FULL_ATTENTION,
    WINDOW_ATTENTION,
    Settings,
    config_from_gguf,
    config_from_hf,
    config_to_hf,
    layer_kinds,
    windows_from_hf,
    windows_to_hf,
)
from kdtune.models.llama import GGUF_KEYS, LLAMA
from kdtune.models.rope import LinearRope
from kdtune.models.rope_settings import kinds_to_hf, rope_of_kinds

_GEMMA2_SWITCHES: dict[str, Any] = {
    "norm_placement": "both",
    "norm_rounds_last": True,
    "norm_offset": 1.0,
    "activation": "gelu_tanh",
}
_SWITCHES: dict[str, Any] = _GEMMA2_SWITCHES | {"qk_norm": "head"}
_LOCAL_BASE = 10_000.0
# The largest model of each family has scores scaled by embed_dim / num_heads, the others by head_dim. GGUF files do not say which,
# nor which layers have the window, nor its base; llama.cpp knows these alone.
_LAYERS_OF_LARGEST = {"gemma2": 46, "gemma3": 62}


def _pattern(num_layers: int, interval: int = 6) -> list[str]:
    return [WINDOW_ATTENTION if (index + 1) % interval else FULL_ATTENTION for index in range(num_layers)]


def _config_from_hf(family: Family, document: Mapping[str, Any]) -> TransformerConfig:
    found = Settings({**family.hf_defaults, **document}, "config.json")
    kinds = layer_kinds(document) or _pattern(found.num_layers(), found.size("sliding_window_pattern"))
    flat, local_base = rope_of_kinds(document, found.number("rope_local_base_freq", _LOCAL_BASE, kind=float))
    return config_from_hf(
        family,
        flat,
        windows=windows_from_hf(family, document, kinds),
        window_rope_base=local_base,
        attention_scale=found.size("query_pre_attn_scalar", kind=float) ** -0.5,
        embedding_scale=found.size("hidden_size") ** 0.5,
    )


def _config_to_hf(family: Family, config: TransformerConfig) -> dict[str, Any]:
    written = config_to_hf(family, config) | windows_to_hf(config)
    scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
    local_base = _LOCAL_BASE if config.window_rope_base is None else config.window_rope_base
    return written | {
        "layer_types": written["layer_types"] or [FULL_ATTENTION] * config.num_layers,
        "query_pre_attn_scalar": round(scale**-2),
        # transformers 4 reads this one and rope_theta, transformers 5 the other.
        "rope_local_base_freq": local_base,
        **kinds_to_hf(written, local_base),
    }


def _config_from_gguf(family: Family, metadata: Mapping[str, Any], **about: Any) -> TransformerConfig:
    is_gemma2, prefix = family.gguf_architecture == "gemma2", f"{family.gguf_architecture}."
    found = Settings(metadata, "GGUF")
    window, layers = f"{prefix}attention.sliding_window", found.num_layers(f"{prefix}block_count")
    size, embed_dim = found.size(window), found.size(f"{prefix}embedding_length")
    per_head = found.size(f"{prefix}attention.key_length")
    if layers == _LAYERS_OF_LARGEST[prefix[:-1]]:
        per_head = embed_dim // found.size(f"{prefix}attention.head_count")
    windows = tuple(size if kind == WINDOW_ATTENTION else None for kind in _pattern(layers, 2 if is_gemma2 else 6))
    own: dict[str, Any] = {"window_rope_base": _LOCAL_BASE}
    if is_gemma2:
        own = {ours: found.number(f"{prefix}{theirs}", kind=float) for ours, _, theirs in _CAPS}
    return config_from_gguf(
        family,
        {key: value for key, value in metadata.items() if key != window},
        windows=windows if any(windows) else (),
        attention_scale=per_head**-0.5,
        embedding_scale=embed_dim**0.5,
        **own,
        **about,
    )


# Our switch, its name in config.json and in GGUF metadata.
_CAPS = (
    ("score_softcap", "attn_logit_softcapping", "attn_logit_softcapping"),
    ("logit_softcap", "final_logit_softcapping", "final_logit_softcapping"),
)


def _gemma2_from_hf(family: Family, document: Mapping[str, Any]) -> TransformerConfig:
    found = Settings({**family.hf_defaults, **document}, "config.json")
    kinds = layer_kinds(document) or _pattern(found.num_layers(), 2)
    return config_from_hf(
        family,
        document,
        windows=windows_from_hf(family, document, kinds),
        attention_scale=found.size("query_pre_attn_scalar", kind=float) ** -0.5,
        embedding_scale=found.size("hidden_size") ** 0.5,
        **{ours: found.number(theirs, kind=float) for ours, theirs, _ in _CAPS},
    )


def _gemma2_to_hf(family: Family, config: TransformerConfig) -> dict[str, Any]:
    written = config_to_hf(family, config) | windows_to_hf(config)
    scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
    return written | {
        "layer_types": written["layer_types"] or [FULL_ATTENTION] * config.num_layers,
        "query_pre_attn_scalar": round(scale**-2),
        **{theirs: getattr(config, ours) for ours, theirs, _ in _CAPS},
    }


def _size(window: int = 512, scalar: int = 256, interval: int = 6, **sizes: Any) -> TransformerConfig:
    usual: dict[str, Any] = {
        "vocab_size": 262_144,
        "num_heads": 4,
        "num_kv_heads": 1,
        "head_dim": 256,
        "max_seq_len": 32_768,
        "rope_base": 1_000_000.0,
        "rope_scaling": None,
        "window_rope_base": _LOCAL_BASE,
        **_SWITCHES,
    }
    return TransformerConfig(
        norm_eps=1e-6,
        tie_embeddings=True,
        attention_scale=scalar**-0.5,
        embedding_scale=sizes["embed_dim"] ** 0.5,
        windows=tuple(window if kind == WINDOW_ATTENTION else None for kind in _pattern(sizes["num_layers"], interval)),
        **usual | sizes,
    )


def _large_size(scalar: int = 256, **sizes: Any) -> TransformerConfig:
    usual: dict[str, Any] = {"vocab_size": 262_208, "max_seq_len": 131_072, "rope_scaling": LinearRope(8.0)}
    return _size(1024, scalar, **usual, **sizes)


def _gemma2_size(scalar: int = 256, **sizes: Any) -> TransformerConfig:
    usual = {
        "vocab_size": 256_000,
        "max_seq_len": 8192,
        "rope_base": 10_000.0,
        "window_rope_base": None,
        "qk_norm": None,
    }
    return _size(4096, scalar, 2, **usual, score_softcap=50.0, logit_softcap=30.0, **sizes)


_NORMS = ("layers.{}.attn_norm.weight", "layers.{}.mlp_norm.weight")

_GGUF = replace(
    GGUF_KEYS.plus(
        {
            "blk.{}.post_attention_norm.weight": "layers.{}.attn_post_norm.weight",
            "blk.{}.post_ffw_norm.weight": "layers.{}.mlp_post_norm.weight",
        }
    ),
    is_interleaved=False,
    norm_offset=1.0,
)

GEMMA2 = replace(
    LLAMA,
    name="Gemma 2",
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    switches=_GEMMA2_SWITCHES,
    hf_constants={
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "use_bidirectional_attention": False,
    },
    hf_defaults={
        "vocab_size": 256_000,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "sliding_window": 4096,
        "query_pre_attn_scalar": 256,
        "tie_word_embeddings": True,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    hf_keys=LLAMA.hf_keys.without(*_NORMS).plus(
        {
            "model.layers.{}.input_layernorm.weight": "layers.{}.attn_norm.weight",
            "model.layers.{}.post_attention_layernorm.weight": "layers.{}.attn_post_norm.weight",
            "model.layers.{}.pre_feedforward_layernorm.weight": "layers.{}.mlp_norm.weight",
            "model.layers.{}.post_feedforward_layernorm.weight": "layers.{}.mlp_post_norm.weight",
        }
    ),
    config_from_hf=_gemma2_from_hf,
    config_to_hf=_gemma2_to_hf,
    gguf_architecture="gemma2",
    gguf_keys=_GGUF,
    config_from_gguf=_config_from_gguf,
    meta_keys=None,
    config_from_meta=None,
    sizes={
        "gemma2_2b": (
            "Gemma 2 2B",
            _gemma2_size(embed_dim=2304, num_layers=26, num_heads=8, num_kv_heads=4, intermediate_dim=9216),
        ),
        "gemma2_9b": (
            "Gemma 2 9B",
            _gemma2_size(embed_dim=3584, num_layers=42, num_heads=16, num_kv_heads=8, intermediate_dim=14_336),
        ),
        "gemma2_27b": (
            "Gemma 2 27B",
            _gemma2_size(
                144,
                embed_dim=4608,
                num_layers=46,
                num_heads=32,
                num_kv_heads=16,
                head_dim=128,
                intermediate_dim=36_864,
            ),
        ),
    },
)
GEMMA3 = replace(
    GEMMA2,
    name="Gemma 3",
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    with_images=("gemma3", "Gemma3ForConditionalGeneration"),
    switches=_SWITCHES,
    hf_constants={
        **GEMMA2.hf_constants,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    },
    hf_defaults={
        "vocab_size": 262_208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131_072,
        "rope_theta": 1_000_000.0,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "query_pre_attn_scalar": 256,
        "tie_word_embeddings": True,
    },
    hf_keys=GEMMA2.hf_keys.plus(
        {f"model.layers.{{}}.self_attn.{name}_norm.weight": f"layers.{{}}.attn.{name}_norm.weight" for name in "qk"}
    ),
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
    gguf_architecture="gemma3",
    gguf_keys=_GGUF.plus(
        {f"blk.{{}}.attn_{name}_norm.weight": f"layers.{{}}.attn.{name}_norm.weight" for name in "qk"}
    ),
    sizes={
        "gemma3_270m": ("Gemma 3 270M", _size(embed_dim=640, num_layers=18, intermediate_dim=2048)),
        "gemma3_1b": ("Gemma 3 1B", _size(embed_dim=1152, num_layers=26, intermediate_dim=6912)),
        "gemma3_4b": (
            "Gemma 3 4B, text part",
            _large_size(embed_dim=2560, num_layers=34, num_heads=8, num_kv_heads=4, intermediate_dim=10_240),
        ),
        "gemma3_12b": (
            "Gemma 3 12B, text part",
            _large_size(embed_dim=3840, num_layers=48, num_heads=16, num_kv_heads=8, intermediate_dim=15_360),
        ),
        "gemma3_27b": (
            "Gemma 3 27B, text part",
            _large_size(
                168,
                embed_dim=5376,
                num_layers=62,
                num_heads=32,
                num_kv_heads=16,
                head_dim=128,
                intermediate_dim=21_504,
            ),
        ),
    },
)
