"""How a model is built for a run, and what is applied to it from outside."""

from kdtune.distributed.activation_checkpoint import apply_activation_checkpointing
from kdtune.distributed.build import build_model, model_config
from kdtune.distributed.compile import apply_compile

__all__ = ["apply_activation_checkpointing", "apply_compile", "build_model", "model_config"]
