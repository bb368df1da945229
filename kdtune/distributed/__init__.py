"""What is applied to a model from outside: its weights and device, recomputation, compilation."""

from kdtune.distributed.activation_checkpoint import apply_activation_checkpointing
from kdtune.distributed.build import build_model
from kdtune.distributed.compile import apply_compile

__all__ = ["apply_activation_checkpointing", "apply_compile", "build_model"]
