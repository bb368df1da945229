"""The SmolLM3 family: as Llama, with every fourth layer without rotary embeddings (NoPE, arXiv 2501.18795).

Sources of the sizes: the ``config.json`` files released with the weights.
"""

import reprlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kdtune.errors import CheckpointError
from kdtune.models.architecture import Family, TransformerConfig
from kdtune.models.file_configs import Settings, config_from_gguf, config_from_hf, config_to_hf
from kdtune.models.llama import LLAMA


def _pattern(num_layers: int, interval: int = 4) -> tuple[bool, ...]:
    rotates = tuple(bool((index + 1) % interval) for index in range(num_layers))
    return () if all(rotates) else rotates


def _config_from_hf(family: Family, document: Mapping[str, Any]) -> TransformerConfig:
    found = Settings({**family.hf_defaults, **document}, "config.json")
    num_layers, given = found.num_layers(), document.get("no_rope_layers")
    if given is None:
        return config_from_hf(family, document, rotates=_pattern(num_layers, found.size("no_rope_layer_interval")))
    # Its name says the opposite: 1 is a layer with rotary embeddings.
    if not isinstance(given, list) or len(given) != num_layers or not {*map(str, given)} <= {"0", "1"}:
        raise CheckpointError(
            f"config.json: no_rope_layers={reprlib.repr(given)}; want {num_layers} values of 0 and 1, one for each layer"
        )
    return config_from_hf(family, document, rotates=() if all(given) else tuple(map(bool, given)))


def _config_to_hf(family: Family, config: TransformerConfig) -> dict[str, Any]:
    rotates = [int(config.is_rotated(index)) for index in range(config.num_layers)]
    return config_to_hf(family, config) | {"no_rope_layers": rotates, "sliding_window": None}


def _config_from_gguf(family: Family, metadata: Mapping[str, Any], **about: Any) -> TransformerConfig:
    """The files do not say which layers; llama.cpp knows this pattern alone."""
    num_layers = Settings(metadata, "GGUF").num_layers(f"{family.gguf_architecture}.block_count")
    return config_from_gguf(family, metadata, rotates=_pattern(num_layers), **about)


SMOLLM3 = replace(
    LLAMA,
    name="SmolLM3",
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    hf_constants={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False},
    hf_defaults={
        "num_key_value_heads": 4,
        "max_position_embeddings": 32_768,
        "no_rope_layer_interval": 4,
        "rope_theta": 2_000_000.0,
        "tie_word_embeddings": True,
    },
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
    gguf_architecture="smollm3",
    config_from_gguf=_config_from_gguf,
    meta_keys=None,
    config_from_meta=None,
    sizes={
        "smollm3_3b": (
            "SmolLM3 3B",
            TransformerConfig(
                vocab_size=128_256,
                embed_dim=2048,
                num_layers=36,
                num_heads=16,
                num_kv_heads=4,
                head_dim=128,
                intermediate_dim=11_008,
                max_seq_len=65_536,
                norm_eps=1e-6,
                rope_base=5_000_000.0,
                rope_scaling=None,
                tie_embeddings=True,
                rotates=_pattern(36),
            ),
        )
    },
)
