"""The text models of the Gemma 3 family (arXiv 2503.19786): norms before and after each block, windows in five of six layers.

Gains are 1 + weight, embeddings are multiplied by the square root of their size, the feed-forward is a GeGLU, and layers with a
window are rotated by a base of their own. Sources of the sizes: the ``config.json`` files released with the weights.
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
    config_from_gguf,
    config_from_hf,
    config_to_hf,
    layer_kinds,
    windows_from_hf,
    windows_to_hf,
)
from kdtune.models.llama import GGUF_KEYS, LLAMA

_SWITCHES: dict[str, Any] = {
    "qk_norm": "head",
    "norm_placement": "both",
    "norm_rounds_last": True,
    "norm_offset": 1.0,
    "activation": "gelu_tanh",
}
_LOCAL_BASE = 10_000.0


def _pattern(num_layers: int, interval: int = 6) -> list[str]:
    return [WINDOW_ATTENTION if (index + 1) % interval else FULL_ATTENTION for index in range(num_layers)]


def _config_from_hf(family: Family, document: Mapping[str, Any]) -> TransformerConfig:
    found = Settings({**family.hf_defaults, **document}, "config.json")
    kinds = layer_kinds(document) or _pattern(found.num_layers(), found.size("sliding_window_pattern"))
    rope, local_base = found.section("rope_parameters"), found.number("rope_local_base_freq", _LOCAL_BASE, kind=float)
    flat = dict(document)
    if rope.keys() & {FULL_ATTENTION, WINDOW_ATTENTION}:  # as transformers 5 writes them, for each kind of layer
        if unknown := sorted(rope.keys() - {FULL_ATTENTION, WINDOW_ATTENTION}):
            raise CheckpointError(f"config.json: rope_parameters has {unknown} beside kinds of layers")
        of_kind = Settings(rope, "config.json: rope_parameters")
        local = Settings(of_kind.section(WINDOW_ATTENTION), f"{of_kind.file}.{WINDOW_ATTENTION}")
        if local.values.get("rope_type", "default") != "default" or local.values.keys() - {"rope_type", "rope_theta"}:
            raise CheckpointError(f"{local.file}={dict(local.values)} is not supported; want 'default' and rope_theta")
        local_base = local.number("rope_theta", local_base, kind=float)
        flat["rope_parameters"] = of_kind.section(FULL_ATTENTION)
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
        "rope_parameters": {
            FULL_ATTENTION: written["rope_parameters"],
            WINDOW_ATTENTION: {"rope_type": "default", "rope_theta": local_base},
        },
    }


def _config_from_gguf(family: Family, metadata: Mapping[str, Any], **about: Any) -> TransformerConfig:
    """The files do not say which layers have the window, nor their base; llama.cpp knows these alone."""
    prefix = f"{family.gguf_architecture}."
    found = Settings(metadata, "GGUF")
    window = f"{prefix}attention.sliding_window"
    size, head_dim = found.size(window), found.size(f"{prefix}attention.key_length")
    windows = tuple(
        size if kind == WINDOW_ATTENTION else None for kind in _pattern(found.num_layers(f"{prefix}block_count"))
    )
    return config_from_gguf(
        family,
        {key: value for key, value in metadata.items() if key != window},
        windows=windows if any(windows) else (),
        window_rope_base=_LOCAL_BASE,
        attention_scale=head_dim**-0.5,
        embedding_scale=found.size(f"{prefix}embedding_length") ** 0.5,
        **about,
    )


def _size(**sizes: Any) -> TransformerConfig:
    return TransformerConfig(
        vocab_size=262_144,
        num_heads=4,
        num_kv_heads=1,
        head_dim=256,
        max_seq_len=32_768,
        norm_eps=1e-6,
        rope_base=1_000_000.0,
        rope_scaling=None,
        tie_embeddings=True,
        attention_scale=256**-0.5,
        embedding_scale=sizes["embed_dim"] ** 0.5,
        windows=tuple(512 if kind == WINDOW_ATTENTION else None for kind in _pattern(sizes["num_layers"])),
        window_rope_base=_LOCAL_BASE,
        **_SWITCHES,
        **sizes,
    )


_NORMS = ("layers.{}.attn_norm.weight", "layers.{}.mlp_norm.weight")

GEMMA3 = replace(
    LLAMA,
    name="Gemma 3",
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    switches=_SWITCHES,
    hf_constants={
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "use_bidirectional_attention": False,
    },
    hf_defaults={
        "vocab_size": 262_208,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131_072,
        "rope_theta": 1_000_000.0,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "query_pre_attn_scalar": 256,
        "tie_word_embeddings": True,
    },
    hf_keys=LLAMA.hf_keys.without(*_NORMS).plus(
        {
            "model.layers.{}.input_layernorm.weight": "layers.{}.attn_norm.weight",
            "model.layers.{}.post_attention_layernorm.weight": "layers.{}.attn_post_norm.weight",
            "model.layers.{}.pre_feedforward_layernorm.weight": "layers.{}.mlp_norm.weight",
            "model.layers.{}.post_feedforward_layernorm.weight": "layers.{}.mlp_post_norm.weight",
            **{
                f"model.layers.{{}}.self_attn.{name}_norm.weight": f"layers.{{}}.attn.{name}_norm.weight"
                for name in "qk"
            },
        }
    ),
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
    gguf_architecture="gemma3",
    gguf_keys=replace(
        GGUF_KEYS.plus(
            {
                "blk.{}.post_attention_norm.weight": "layers.{}.attn_post_norm.weight",
                "blk.{}.post_ffw_norm.weight": "layers.{}.mlp_post_norm.weight",
                **{f"blk.{{}}.attn_{name}_norm.weight": f"layers.{{}}.attn.{name}_norm.weight" for name in "qk"},
            }
        ),
        is_interleaved=False,
        norm_offset=1.0,
    ),
    config_from_gguf=_config_from_gguf,
    meta_keys=None,
    config_from_meta=None,
    sizes={
        "gemma3_270m": ("Gemma 3 270M", _size(embed_dim=640, num_layers=18, intermediate_dim=2048)),
        "gemma3_1b": ("Gemma 3 1B", _size(embed_dim=1152, num_layers=26, intermediate_dim=6912)),
    },
)
