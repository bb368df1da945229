"""The Llama family, and SmolLM2, which shares its architecture: sizes, other formats' names and settings.

Sources of the sizes: the ``config.json`` and ``params.json`` files released with the weights.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kdtune.errors import CheckpointError
from kdtune.models.architecture import Family, KeyMap, TransformerConfig
from kdtune.models.file_configs import ROPE_FACTORS, Settings, config_from_hf, config_to_hf
from kdtune.models.rope import RopeScaling
from kdtune.models.transformer import Transformer

_LLAMA3_1_ROPE = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192)
_LLAMA3_2_ROPE = replace(_LLAMA3_1_ROPE, factor=32.0)

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
    _LLAMA2, vocab_size=128_256, num_kv_heads=8, intermediate_dim=14_336, max_seq_len=8192, rope_base=500_000.0
)
_LLAMA3_1 = replace(_LLAMA3, max_seq_len=131_072, rope_scaling=_LLAMA3_1_ROPE)
_LLAMA3_2 = replace(_LLAMA3_1, rope_scaling=_LLAMA3_2_ROPE, tie_embeddings=True)
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

_SIZES: dict[str, tuple[str, TransformerConfig]] = {
    "llama2_7b": ("Llama 2 7B", _LLAMA2),
    "llama2_13b": (
        "Llama 2 13B",
        replace(_LLAMA2, embed_dim=5120, num_layers=40, num_heads=40, num_kv_heads=40, intermediate_dim=13_824),
    ),
    "llama2_70b": ("Llama 2 70B", replace(_LLAMA2, **_WIDE_70B)),
    "llama3_8b": ("Llama 3 8B", _LLAMA3),
    "llama3_70b": ("Llama 3 70B", replace(_LLAMA3, **_WIDE_70B)),
    "llama3_1_8b": ("Llama 3.1 8B", _LLAMA3_1),
    "llama3_1_70b": ("Llama 3.1 70B, and 3.3 70B", replace(_LLAMA3_1, **_WIDE_70B)),
    "llama3_1_405b": (
        "Llama 3.1 405B",
        replace(_LLAMA3_1, embed_dim=16_384, num_layers=126, num_heads=128, intermediate_dim=53_248),
    ),
    "llama3_2_1b": (
        "Llama 3.2 1B",
        replace(_LLAMA3_2, embed_dim=2048, num_layers=16, head_dim=64, intermediate_dim=8192),
    ),
    "llama3_2_3b": (
        "Llama 3.2 3B",
        replace(_LLAMA3_2, embed_dim=3072, num_layers=28, num_heads=24, intermediate_dim=8192),
    ),
    "smollm2_135m": (
        "SmolLM2 135M",
        replace(_SMOLLM2, embed_dim=576, num_layers=30, num_heads=9, num_kv_heads=3, intermediate_dim=1536),
    ),
    "smollm2_360m": (
        "SmolLM2 360M",
        replace(_SMOLLM2, embed_dim=960, num_layers=32, num_heads=15, num_kv_heads=5, intermediate_dim=2560),
    ),
    "smollm2_1_7b": ("SmolLM2 1.7B", replace(_SMOLLM2, rope_base=130_000.0)),
}

_HF = KeyMap(
    "Hugging Face",
    {
        "model.embed_tokens.weight": "tok_embeddings.weight",
        "model.layers.{}.input_layernorm.weight": "layers.{}.attn_norm.weight",
        "model.layers.{}.self_attn.q_proj.weight": "layers.{}.attn.q_proj.weight",
        "model.layers.{}.self_attn.k_proj.weight": "layers.{}.attn.k_proj.weight",
        "model.layers.{}.self_attn.v_proj.weight": "layers.{}.attn.v_proj.weight",
        "model.layers.{}.self_attn.o_proj.weight": "layers.{}.attn.output_proj.weight",
        "model.layers.{}.post_attention_layernorm.weight": "layers.{}.mlp_norm.weight",
        "model.layers.{}.mlp.gate_proj.weight": "layers.{}.mlp.gate_proj.weight",
        "model.layers.{}.mlp.up_proj.weight": "layers.{}.mlp.up_proj.weight",
        "model.layers.{}.mlp.down_proj.weight": "layers.{}.mlp.down_proj.weight",
        "model.norm.weight": "norm.weight",
        "lm_head.weight": "output.weight",
    },
    derived=frozenset({"model.rotary_emb.inv_freq", "model.layers.{}.self_attn.rotary_emb.inv_freq"}),
)

_META = KeyMap(
    "Meta",
    {
        "tok_embeddings.weight": "tok_embeddings.weight",
        "layers.{}.attention_norm.weight": "layers.{}.attn_norm.weight",
        "layers.{}.attention.wq.weight": "layers.{}.attn.q_proj.weight",
        "layers.{}.attention.wk.weight": "layers.{}.attn.k_proj.weight",
        "layers.{}.attention.wv.weight": "layers.{}.attn.v_proj.weight",
        "layers.{}.attention.wo.weight": "layers.{}.attn.output_proj.weight",
        "layers.{}.ffn_norm.weight": "layers.{}.mlp_norm.weight",
        "layers.{}.feed_forward.w1.weight": "layers.{}.mlp.gate_proj.weight",
        "layers.{}.feed_forward.w3.weight": "layers.{}.mlp.up_proj.weight",
        "layers.{}.feed_forward.w2.weight": "layers.{}.mlp.down_proj.weight",
        "norm.weight": "norm.weight",
        "output.weight": "output.weight",
    },
    derived=frozenset({"rope.freqs"}),
    is_interleaved=True,
)

GGUF_KEYS = KeyMap(
    "GGUF",
    {
        "token_embd.weight": "tok_embeddings.weight",
        "blk.{}.attn_norm.weight": "layers.{}.attn_norm.weight",
        "blk.{}.attn_q.weight": "layers.{}.attn.q_proj.weight",
        "blk.{}.attn_k.weight": "layers.{}.attn.k_proj.weight",
        "blk.{}.attn_v.weight": "layers.{}.attn.v_proj.weight",
        "blk.{}.attn_output.weight": "layers.{}.attn.output_proj.weight",
        "blk.{}.ffn_norm.weight": "layers.{}.mlp_norm.weight",
        "blk.{}.ffn_gate.weight": "layers.{}.mlp.gate_proj.weight",
        "blk.{}.ffn_up.weight": "layers.{}.mlp.up_proj.weight",
        "blk.{}.ffn_down.weight": "layers.{}.mlp.down_proj.weight",
        "output_norm.weight": "norm.weight",
        "output.weight": "output.weight",
    },
    derived=frozenset({ROPE_FACTORS}),
    is_interleaved=True,
)

_META_KEYS = {
    "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "vocab_size", "multiple_of", "ffn_dim_multiplier",
    "norm_eps", "rope_theta", "use_scaled_rope", "rope_scaling_factor", "max_seq_len", "max_batch_size",
}  # fmt: skip


def config_from_meta(
    params: Mapping[str, Any],
    *,
    vocab_size: int | None = None,
    max_seq_len: int | None = None,
    tie_embeddings: bool | None = None,
) -> TransformerConfig:
    """Return the config of the model that Meta's ``params.json`` describes.

    The file does not contain the context length, whether the head is tied, or the factor of a scaled RoPE. If a published
    size agrees with everything in the file, they are that size's; else 4096, untied and 8 (as in Meta's own code).

    Args:
        params: The parsed file.
        vocab_size: Rows of the embeddings, for Llama 2, whose file says -1.
        max_seq_len: Context length; None: as above.
        tie_embeddings: Tie the head to the embedding; None: as above.

    Raises:
        CheckpointError: A missing or unknown setting.
    """
    if unknown := sorted(params.keys() - _META_KEYS):
        raise CheckpointError(f"params.json: unsupported settings {unknown}; want a text model without quantization")
    found = Settings(params, "params.json")
    dim, num_heads = found.size("dim"), found.size("n_heads")
    stated_vocab_size = params.get("vocab_size", -1)
    if type(stated_vocab_size) is not int:
        raise CheckpointError(f"params.json: vocab_size={stated_vocab_size!r}; want an integer")
    stated_vocab_size = (vocab_size or -1) if stated_vocab_size <= 0 else stated_vocab_size
    if stated_vocab_size <= 0:
        raise CheckpointError("params.json: no vocab_size; pass the number of rows of tok_embeddings.weight")
    scaled = replace(_LLAMA3_1_ROPE, factor=float(params.get("rope_scaling_factor", _LLAMA3_1_ROPE.factor)))
    config = found.config(
        vocab_size=stated_vocab_size,
        embed_dim=dim,
        num_layers=found.size("n_layers"),
        num_heads=num_heads,
        num_kv_heads=found.number("n_kv_heads", num_heads),
        head_dim=found.number("head_dim", dim // num_heads),
        intermediate_dim=_meta_intermediate_dim(found),
        max_seq_len=4096,
        norm_eps=found.size("norm_eps", kind=float),
        rope_base=found.number("rope_theta", 10_000.0, kind=float),
        rope_scaling=scaled if params.get("use_scaled_rope") else None,
        tie_embeddings=False,
    )
    sizes = (size for _, size in _SIZES.values())
    config = next((size for size in sizes if _stated_by_meta(size) == _stated_by_meta(config)), config)
    if "rope_scaling_factor" in params and config.rope_scaling is not None:
        config = replace(config, rope_scaling=scaled)
    return replace(
        config,
        max_seq_len=config.max_seq_len if max_seq_len is None else max_seq_len,
        tie_embeddings=config.tie_embeddings if tie_embeddings is None else tie_embeddings,
        family=LLAMA,
    )


def _stated_by_meta(config: TransformerConfig) -> TransformerConfig:
    """Return the config with every field that params.json lacks set to one value."""
    scaling = None if config.rope_scaling is None else _LLAMA3_1_ROPE
    return replace(config, max_seq_len=1, tie_embeddings=False, rope_scaling=scaling)


def _meta_intermediate_dim(found: Settings) -> int:
    """Return two thirds of 4 * dim, times the multiplier, rounded up to a multiple."""
    inner = int(2 * 4 * found.size("dim") / 3)
    inner = int(found.number("ffn_dim_multiplier", 1, kind=float) * inner)
    multiple = found.number("multiple_of", 256)
    return -(-inner // multiple) * multiple


LLAMA = Family(
    name="Llama",
    model_type="llama",
    architecture="LlamaForCausalLM",
    switches={},
    hf_constants={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    hf_keys=_HF,
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    gguf_architecture="llama",
    gguf_keys=GGUF_KEYS,
    meta_keys=_META,
    config_from_meta=config_from_meta,
    sizes=_SIZES,
)


def llama(
    *,
    vocab_size: int,
    embed_dim: int,
    num_layers: int,
    num_heads: int,
    intermediate_dim: int,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    max_seq_len: int = 8192,
    norm_eps: float = 1e-5,
    rope_base: float = 500_000.0,
    rope_scaling: RopeScaling | None = None,
    tie_embeddings: bool = False,
) -> Transformer:
    """Build a Llama of any size, with random weights.

    Args:
        vocab_size: rows of the embedding and of the head.
        embed_dim: width of the residual stream.
        num_layers: decoder layers.
        num_heads: query heads.
        intermediate_dim: width inside the feed-forward.
        num_kv_heads: key and value heads; None: as many as query heads.
        head_dim: width of a head; None: ``embed_dim / num_heads``.
        max_seq_len: the context, in tokens.
        norm_eps: epsilon of the RMS norms.
        rope_base: theta of the rotary embedding.
        rope_scaling: Llama 3.1's frequency scaling for a longer context; None: no scaling.
        tie_embeddings: the head is the embedding.
    """
    config = TransformerConfig(
        vocab_size=vocab_size,
        embed_dim=embed_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads if num_kv_heads is None else num_kv_heads,
        head_dim=embed_dim // num_heads if head_dim is None else head_dim,
        intermediate_dim=intermediate_dim,
        max_seq_len=max_seq_len,
        norm_eps=norm_eps,
        rope_base=rope_base,
        rope_scaling=rope_scaling,
        tie_embeddings=tie_embeddings,
        family=LLAMA,
    )
    return Transformer(config)
