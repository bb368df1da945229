from .activations import Checkpointed, apply_activation_checkpointing, apply_activation_offloading
from .build import apply_compile, build_model
from .checks import problems
from .fsdp import shard_model
from .meta import Adapter, Builder, meta_model, model_config

__all__ = [
    "Adapter",
    "Builder",
    "Checkpointed",
    "apply_activation_checkpointing",
    "apply_activation_offloading",
    "apply_compile",
    "build_model",
    "meta_model",
    "model_config",
    "problems",
    "shard_model",
]
