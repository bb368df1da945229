"""Random models of every family by transformers, with sizes as no published model has them."""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional
from transformers.masking_utils import eager_mask
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from kdtune.checkpoint import load_model
from kdtune.models import Transformer

# Longer than every window below.
TOKENS = torch.randint(96, (2, 13), generator=torch.Generator().manual_seed(0))
SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "rope_theta": 1000.0, "sliding_window": None, "pad_token_id": None,
}  # fmt: skip
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
FACTORS = {
    "attention_multiplier": 0.6,
    "residual_multiplier": 0.22,
    "embedding_multiplier": 12.0,
    "logits_scaling": 4.0,
}
GEMMA: dict[str, Any] = {
    "rope_theta": None,
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
    },
}
PHI: dict[str, Any] = {"max_position_embeddings": 64, "rope_theta": 1000.0, "sliding_window": 5}
LONG: dict[str, Any] = {"rope_type": "longrope", "short_factor": [1.1, 1.5, 2.0], "long_factor": [2.0, 5.0, 9.0]}
YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 20, "beta_fast": 3.0}
# Heads that are not hidden_size / num_attention_heads wide, windows shorter than the text, tied and untied.
REFERENCES: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral, window": ("mistral", {"sliding_window": 5, "head_dim": 24}),
    "mistral": ("mistral", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "ministral": ("ministral", {"sliding_window": 4, "layer_types": MIXED, "head_dim": 24}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2, window": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 24}),
    "qwen3, window": (
        "qwen3",
        {"head_dim": 12, "use_sliding_window": True, "sliding_window": 3, "layer_types": MIXED, "tie_word_embeddings": True},
    ),
    "olmo2": ("olmo2", {"head_dim": 8}),
    "olmo2, tied": ("olmo2", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "olmo3": (
        "olmo3",
        {
            "num_hidden_layers": 4,
            "sliding_window": 5,
            "num_key_value_heads": 1,
            "rope_theta": None,
            "rope_parameters": {
                "full_attention": YARN | {"rope_theta": 1000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
            },
        },
    ),
    "qwen3, yarn": (
        "qwen3",
        {"head_dim": 24, "rope_parameters": YARN | {"attention_factor": 1.5, "beta_slow": 0.4, "truncate": False}},
    ),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1]}),
    "smollm3, pattern": ("smollm3", {"num_hidden_layers": 4, "tie_word_embeddings": False}),
    "granite": ("granite", FACTORS | {"tie_word_embeddings": True}),
    "gemma3": ("gemma3_text", {"num_hidden_layers": 6, "sliding_window": 5, "head_dim": 12, "query_pre_attn_scalar": 12} | GEMMA),
    "gemma3, other": (
        "gemma3_text",
        {"sliding_window": 3, "layer_types": MIXED, "head_dim": 24, "query_pre_attn_scalar": 7, "tie_word_embeddings": False} | GEMMA,
    ),
    "gemma3, linear": (
        "gemma3_text",
        {
            "sliding_window": 4,
            "layer_types": MIXED,
            "head_dim": 8,
            "query_pre_attn_scalar": 11,
            "rope_theta": None,
            "rope_parameters": GEMMA["rope_parameters"]
            | {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0}},
        },
    ),
    "phi3": ("phi3", PHI | {"head_dim": 24, "partial_rotary_factor": 0.5}),
    # The text is longer than 5 tokens, and grows beyond 16.
    "phi3, long": (
        "phi3",
        PHI | {"original_max_position_embeddings": 5, "partial_rotary_factor": 0.75, "rope_scaling": LONG},
    ),
    "phi3, short": (
        "phi3",
        PHI
        | {
            "original_max_position_embeddings": 16,
            "rope_scaling": LONG | {"short_factor": [1.0, 1.1, 1.5, 2.0], "long_factor": [1.0, 2.0, 5.0, 9.0]},
            "sliding_window": None,
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
        },
    ),
    "gemma2": (
        "gemma2",
        {
            "num_hidden_layers": 4,
            "sliding_window": 5,
            "head_dim": 12,
            "query_pre_attn_scalar": 3,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma2, other": (
        "gemma2",
        {
            "layer_types": MIXED,
            "sliding_window": 3,
            "head_dim": 24,
            "query_pre_attn_scalar": 7,
            "attn_logit_softcapping": 0.5,
            "final_logit_softcapping": None,
            "num_key_value_heads": 1,
            "tie_word_embeddings": False,
        },
    ),
    "granite, untied": ("granite", FACTORS | {"num_key_value_heads": 4}),
}  # fmt: skip
ONE_OF_EACH = [
    "mistral, window",
    "ministral",
    "qwen2",
    "qwen3",
    "olmo2",
    "smollm3",
    "granite",
    "phi3",
    "gemma2",
    "gemma3",
]


def config_of(name: str, **changes: Any) -> Any:
    model_type, settings = REFERENCES[name]
    return transformers.AutoConfig.for_model(model_type, **(SIZES | settings | changes))


def reference(name: str, folder: Path, *, seed: int = 0, **changes: Any) -> Any:
    """A random model of transformers, saved in the folder; its norms and biases are far from where they start."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config_of(name, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return model


def attend_in_float64(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, scaling: float, softcap: float, **_: Any
) -> tuple[Tensor, None]:
    """Gemma 2's attention, whose softmax transformers rounds to fp32."""
    groups = module.num_key_value_groups
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.tanh(query @ key.transpose(2, 3) * scaling / softcap) * softcap
    return (functional.softmax(scores + mask, -1) @ value).transpose(1, 2), None


transformers.AttentionInterface.register("float64", attend_in_float64)
transformers.AttentionMaskInterface.register("float64", eager_mask)


def reread(folder: Path) -> Any:
    """The model in a folder by transformers, in float64: it rounds norms and rotary tables to fp32, so these are computed here."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    rotary = model.model.rotary_emb

    def tables(hidden: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, Tensor]:
        frequencies = rotary.inv_freq if layer_type is None else getattr(rotary, f"{layer_type}_inv_freq")
        factor = rotary.attention_scaling if layer_type is None else getattr(rotary, f"{layer_type}_attention_scaling")
        if getattr(rotary, "rope_type", "") == "longrope":
            original = model.config.rope_parameters["original_max_position_embeddings"]
            length = int(position_ids.max()) + 1
            frequencies = ROPE_INIT_FUNCTIONS["longrope"](model.config, "cpu", seq_len=length)[0]
            assert (length > original) == (not torch.equal(frequencies, rotary.original_inv_freq))
        angles = position_ids[..., None].double() * frequencies.double()
        twice = torch.cat((angles, angles), -1)
        return twice.cos() * factor, twice.sin() * factor

    rotary.forward = tables
    if model.config.model_type == "gemma2":
        model.config._attn_implementation = "float64"
    for module in model.modules():
        if type(module).__name__ in ("Gemma2RMSNorm", "Gemma3RMSNorm"):
            module.forward = lambda hidden, norm=module: (
                hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + norm.eps) * (1 + norm.weight)
            )
        elif type(module).__name__.endswith("RMSNorm"):
            module.forward = lambda hidden, norm=module: (
                hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + norm.variance_epsilon) * norm.weight
            )
        if hasattr(module, "embed_scale"):
            module.embed_scale = torch.tensor(module.scalar_embed_scale, dtype=torch.float64)
    return model


def assert_same(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * expected.detach().abs().max().item())


def float64(folder: Path) -> Transformer:
    return load_model(folder, dtype=torch.float64)
