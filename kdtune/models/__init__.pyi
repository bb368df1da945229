from .architecture import Family, TransformerConfig, weight_shapes
from .builders import Builder
from .documents import Documents
from .dtypes import dtype_from_name
from .families import family_of, family_of_gguf, family_of_meta, read_hf_config, text_config, write_hf_config
from .gemma import GEMMA2, GEMMA3
from .granite import GRANITE
from .hf import hf_model
from .known_families import FAMILIES
from .kv_cache import KVCache
from .llama import LLAMA, llama
from .lora import (
    LoRALinear,
    adapted_linears,
    adapter_parameters,
    apply_lora,
    has_adapters,
    merge_adapters,
    merged_config,
    merged_weights,
)
from .mistral import MINISTRAL, MISTRAL
from .olmo import OLMO2, OLMO3
from .phi import PHI3
from .qwen import QWEN2, QWEN3
from .rope import LinearRope, LongRope, RopeScaling, YarnRope
from .smollm3 import SMOLLM3
from .transformer import OutputHead, Transformer, new_model, on_meta_device

__all__ = [
    "FAMILIES",
    "GEMMA2",
    "GEMMA3",
    "GRANITE",
    "LLAMA",
    "MINISTRAL",
    "MISTRAL",
    "OLMO2",
    "OLMO3",
    "PHI3",
    "QWEN2",
    "QWEN3",
    "SMOLLM3",
    "Builder",
    "Documents",
    "Family",
    "KVCache",
    "LinearRope",
    "LoRALinear",
    "LongRope",
    "OutputHead",
    "RopeScaling",
    "Transformer",
    "TransformerConfig",
    "YarnRope",
    "adapted_linears",
    "adapter_parameters",
    "apply_lora",
    "dtype_from_name",
    "family_of",
    "family_of_gguf",
    "family_of_meta",
    "has_adapters",
    "hf_model",
    "llama",
    "merge_adapters",
    "merged_config",
    "merged_weights",
    "new_model",
    "on_meta_device",
    "read_hf_config",
    "text_config",
    "weight_shapes",
    "write_hf_config",
]

# The builders of published sizes: X, lora_X and qlora_X for each X in the families' tables (`kdtune ls models`).
def __getattr__(name: str) -> Builder: ...
