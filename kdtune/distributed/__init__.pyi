from .activation_checkpoint import apply_activation_checkpointing
from .bridge import END, Bridge
from .build import build_model, distributed_model, meta_model, model_config, spread_problems
from .compile import apply_compile
from .fake import fake_world
from .parallelism import Parallelism, layout_problems, parallelism_problems, parallelize, shard_model
from .spread import in_step, spread, spread_in_batches
from .world import World, is_first_on_host, is_under_torchrun, start_world, world_size

__all__ = [
    "END",
    "Bridge",
    "Parallelism",
    "World",
    "apply_activation_checkpointing",
    "apply_compile",
    "build_model",
    "distributed_model",
    "fake_world",
    "in_step",
    "is_first_on_host",
    "is_under_torchrun",
    "layout_problems",
    "meta_model",
    "model_config",
    "parallelism_problems",
    "parallelize",
    "shard_model",
    "spread",
    "spread_in_batches",
    "spread_problems",
    "start_world",
    "world_size",
]
