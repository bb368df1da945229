"""The OLMo 2 family (arXiv 2501.00656): norms after attention and feed-forward, and over all query and all key heads together.

Sources of the sizes: the ``config.json`` files released with the weights.
"""

from dataclasses import replace

from kdtune.models.architecture import TransformerConfig
from kdtune.models.llama import GGUF_KEYS, LLAMA

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
