"""Processes of a run, and models built and parallelized on them."""

from kdtune.distributed.activation_checkpoint import apply_activation_checkpointing
from kdtune.distributed.bridge import END, Bridge
from kdtune.distributed.build import build_model, distributed_model, meta_model, model_config, spread_problems
from kdtune.distributed.compile import apply_compile
from kdtune.distributed.fake import fake_world
from kdtune.distributed.parallelism import Parallelism, layout_problems, parallelism_problems, parallelize, shard_model
from kdtune.distributed.spread import in_step, spread, spread_in_batches
from kdtune.distributed.world import World, is_first_on_host, is_under_torchrun, start_world, world_size

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
