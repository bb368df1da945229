"""The dense Granite 3 family: as Llama, with factors on embeddings, scores, residual stream and logits (muP, arXiv 2203.03466).

Sources of the sizes: the ``config.json`` files released with the weights.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kdtune.models.architecture import Family, TransformerConfig
from kdtune.models.file_configs import Settings, config_from_gguf, config_from_hf, config_to_hf
from kdtune.models.llama import LLAMA

# Our switch, its name in config.json and in GGUF metadata.
_FACTORS = (
    ("attention_scale", "attention_multiplier", "attention.scale"),
    ("residual_scale", "residual_multiplier", "residual_scale"),
    ("embedding_scale", "embedding_multiplier", "embedding_scale"),
    ("logit_divisor", "logits_scaling", "logit_scale"),
)

_2B = TransformerConfig(
    vocab_size=49_159,
    embed_dim=2048,
    num_layers=40,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    intermediate_dim=8192,
    max_seq_len=131_072,
    norm_eps=1e-5,
    rope_base=10_000_000.0,
    rope_scaling=None,
    tie_embeddings=True,
    attention_scale=0.015625,
    residual_scale=0.22,
    embedding_scale=12.0,
    logit_divisor=8.0,
)


def _config_from_hf(family: Family, document: Mapping[str, Any]) -> TransformerConfig:
    found = Settings({**family.hf_defaults, **document}, "config.json")
    return config_from_hf(family, document, **{ours: found.size(theirs, kind=float) for ours, theirs, _ in _FACTORS})


def _config_to_hf(family: Family, config: TransformerConfig) -> dict[str, Any]:
    return config_to_hf(family, config) | {theirs: getattr(config, ours) for ours, theirs, _ in _FACTORS}


def _config_from_gguf(family: Family, metadata: Mapping[str, Any], **about: Any) -> TransformerConfig:
    found = Settings(metadata, "GGUF")
    # Stored as 32-bit floats: 0.22 reads as 0.219999998.
    factors: dict[str, Any] = {
        ours: float(f"{found.size(f'{family.gguf_architecture}.{theirs}', kind=float):.7g}")
        for ours, _, theirs in _FACTORS
    }
    return config_from_gguf(family, metadata, **factors, **about)


GRANITE = replace(
    LLAMA,
    name="Granite",
    model_type="granite",
    architecture="GraniteForCausalLM",
    hf_defaults={theirs: 1.0 for _, theirs, _ in _FACTORS},
    config_from_hf=_config_from_hf,
    config_to_hf=_config_to_hf,
    gguf_architecture="granite",
    config_from_gguf=_config_from_gguf,
    meta_keys=None,
    config_from_meta=None,
    sizes={
        "granite3_3_2b": ("Granite 3.3 2B", _2B),
        "granite3_3_8b": (
            "Granite 3.3 8B",
            replace(
                _2B,
                embed_dim=4096,
                head_dim=128,
                intermediate_dim=12_800,
                attention_scale=0.0078125,
                logit_divisor=16.0,
            ),
        ),
    },
)
