from .activation_checkpoint import apply_activation_checkpointing
from .build import build_model, distributed_model
from .compile import apply_compile
from .fsdp import parallelize, shard_model
from .meta import meta_model, model_config
from .problems import parallelism_problems, spread_problems

__all__ = [
    "apply_activation_checkpointing",
    "apply_compile",
    "build_model",
    "distributed_model",
    "meta_model",
    "model_config",
    "parallelism_problems",
    "parallelize",
    "shard_model",
    "spread_problems",
]
