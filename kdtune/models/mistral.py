"""The Mistral family (arXiv 2310.06825) and Ministral: as Llama, with a window of attention in some releases.

Sources of the sizes: the ``config.json`` files released with the weights.
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
from kdtune.models.llama import LLAMA

_7B = TransformerConfig(
    vocab_size=32_768,
    embed_dim=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_dim=14_336,
    max_seq_len=32_768,
    norm_eps=1e-5,
    rope_base=1_000_000.0,
    rope_scaling=None,
    tie_embeddings=False,
)
_40_LAYERS = replace(_7B, vocab_size=131_072, embed_dim=5120, num_layers=40)

_SIZES: dict[str, tuple[str, TransformerConfig]] = {
    "mistral_7b_v0_1": (
        "Mistral 7B v0.1",
        replace(_7B, vocab_size=32_000, rope_base=10_000.0, windows=(4096,) * 32),
    ),
    "mistral_7b_v0_2": ("Mistral 7B v0.2", replace(_7B, vocab_size=32_000)),
    "mistral_7b_v0_3": ("Mistral 7B v0.3", _7B),
    "mistral_nemo_12b": ("Mistral NeMo 12B", replace(_40_LAYERS, max_seq_len=131_072)),
    "mistral_small_22b": (
        "Mistral Small 22B (2409)",
        replace(_7B, embed_dim=6144, num_layers=56, num_heads=48, intermediate_dim=16_384),
    ),
    "mistral_small_24b": (
        "Mistral Small 24B (2501)",
        replace(_40_LAYERS, intermediate_dim=32_768, rope_base=100_000_000.0),
    ),
}


def _every_layer(document: Mapping[str, Any]) -> list[str]:
    return [WINDOW_ATTENTION] * Settings(document, "config.json").num_layers()


def _config_from_hf(family: Family, document: Mapping[str, Any]) -> TransformerConfig:
    kinds = layer_kinds(document)
    windows = windows_from_hf(family, document, _every_layer(document))
    if windows and kinds and FULL_ATTENTION in kinds:
        raise CheckpointError(
            f"config.json: layer_types with {FULL_ATTENTION!r}: {family.architecture} has its sliding_window={windows[0]} in "
            "every layer; want MinistralForCausalLM (model_type 'ministral'), which reads layer_types"
        )
    return config_from_hf(family, document, windows=windows)


def _config_to_hf(family: Family, config: TransformerConfig) -> dict[str, Any]:
    return config_to_hf(family, config) | {"sliding_window": windows_to_hf(config)["sliding_window"]}


def _ministral_from_hf(family: Family, document: Mapping[str, Any]) -> TransformerConfig:
    kinds = layer_kinds(document) or _every_layer(document)
    return config_from_hf(family, document, windows=windows_from_hf(family, document, kinds))


def _ministral_to_hf(family: Family, config: TransformerConfig) -> dict[str, Any]:
    return config_to_hf(family, config) | windows_to_hf(config)


MISTRAL = replace(
    LLAMA,
    name="Mistral",
    model_type="mistral",
    architecture="MistralForCausalLM",
    hf_constants={"hidden_act": "silu"},
    hf_defaults={"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096},
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
    meta_keys=None,
    config_from_meta=None,
    sizes=_SIZES,
)
MINISTRAL = replace(
    MISTRAL,
    name="Ministral",
    model_type="ministral",
    architecture="MinistralForCausalLM",
    config_from_hf=_ministral_from_hf,
    config_to_hf=_ministral_to_hf,
    sizes={
        "ministral_8b": (
            "Ministral 8B (2410)",
            replace(
                _7B,
                vocab_size=131_072,
                num_layers=36,
                intermediate_dim=12_288,
                rope_base=100_000_000.0,
                windows=(32_768,) * 36,
            ),
        )
    },
)
