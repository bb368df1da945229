from .activation_checkpoint import apply_activation_checkpointing
from .build import build_model
from .compile import apply_compile
from .fsdp import shard_model
from .meta import Adapter, Builder, meta_model, model_config
from .problems import spread_problems

__all__ = [
    "Adapter",
    "Builder",
    "apply_activation_checkpointing",
    "apply_compile",
    "build_model",
    "meta_model",
    "model_config",
    "shard_model",
    "spread_problems",
]
