"""Tensor names and row orders of Hugging Face, Meta and GGUF checkpoints, as data. Reads and writes no files.

The formats' settings (``config.json``, ``params.json``, GGUF metadata) are read by the functions of ``configs``, which
this module re-exports.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from kdtune.errors import CheckpointError
from kdtune.models.llama.configs import config_from_gguf, config_from_hf, config_from_meta, config_to_hf
from kdtune.models.transformer import TransformerConfig

__all__ = [
    "GGUF",
    "GGUF_ROPE_FACTORS",
    "HF",
    "META",
    "KeyMap",
    "config_from_gguf",
    "config_from_hf",
    "config_from_meta",
    "config_to_hf",
    "gguf_to_kdtune",
    "hf_to_kdtune",
    "kdtune_to_gguf",
    "kdtune_to_hf",
    "kdtune_to_meta",
    "meta_to_kdtune",
    "permute",
    "rotary_heads",
    "unpermute",
]

_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class KeyMap:
    """Another format's tensor names, mapped to ours and back. ``{}`` in a pattern is the layer's number."""

    format: str
    ours_by_theirs: Mapping[str, str]
    derived: frozenset[str]
    """Names of tables that old checkpoints contain and the model computes itself."""

    @cached_property
    def _theirs_by_ours(self) -> dict[str, str]:
        return {ours: theirs for theirs, ours in self.ours_by_theirs.items()}

    def knows(self, name: str) -> bool:
        """Return whether the name is a weight of a Llama model in this format."""
        return _pattern(name)[0] in self.ours_by_theirs

    def is_derived(self, name: str) -> bool:
        """Return whether the tensor may be skipped because the model computes it from its config."""
        return _pattern(name)[0] in self.derived

    def to_kdtune(self, name: str) -> str:
        """Return our name for theirs. Raises CheckpointError for a name no Llama model has."""
        return self._translate(name, self.ours_by_theirs)

    def from_kdtune(self, name: str) -> str:
        """Return their name for ours. Raises CheckpointError for a name our models do not have."""
        return self._translate(name, self._theirs_by_ours)

    def _translate(self, name: str, table: Mapping[str, str]) -> str:
        pattern, layer = _pattern(name)
        if pattern not in table:
            raise CheckpointError(
                f"unexpected tensor name: {name!r}; a Llama model in {self.format} names has no such tensor"
            )
        return table[pattern].replace("{}", layer)


def _pattern(name: str) -> tuple[str, str]:
    """Return the name with its layer number replaced by {}, and that number ('' if there is none)."""
    found = _LAYER.search(name)
    return (_LAYER.sub("{}", name, count=1), found.group()) if found else (name, "")


HF = KeyMap(
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

META = KeyMap(
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
)

# The table of frequency factors is derived too, but it is the only place where a GGUF file says how Llama 3.1's
# frequencies are scaled: config_from_gguf reads it.
GGUF_ROPE_FACTORS = "rope_freqs.weight"

GGUF = KeyMap(
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
    derived=frozenset({GGUF_ROPE_FACTORS}),
)

hf_to_kdtune, kdtune_to_hf = HF.to_kdtune, HF.from_kdtune
meta_to_kdtune, kdtune_to_meta = META.to_kdtune, META.from_kdtune
gguf_to_kdtune, kdtune_to_gguf = GGUF.to_kdtune, GGUF.from_kdtune


def rotary_heads(name: str, config: TransformerConfig) -> int | None:
    """Return the number of heads of a weight (our name) whose rows are in rotary order, as q and k; None for the others."""
    if name.endswith(".attn.q_proj.weight"):
        return config.num_heads
    if name.endswith(".attn.k_proj.weight"):
        return config.num_kv_heads
    return None


def unpermute(weight: Tensor, num_heads: int) -> Tensor:
    """Reorder each head's rows of a q or k weight from interleaved (Meta, GGUF) to half-split (ours, Hugging Face's).

    The first dimension is the rows; the others may be anything, including quantized blocks.
    """
    rows = weight.unflatten(0, (num_heads, -1, 2))
    return rows.transpose(1, 2).flatten(0, 2).contiguous()


def permute(weight: Tensor, num_heads: int) -> Tensor:
    """The inverse of :func:`unpermute`: half-split rows to interleaved."""
    rows = weight.unflatten(0, (num_heads, 2, -1))
    return rows.transpose(1, 2).flatten(0, 2).contiguous()
