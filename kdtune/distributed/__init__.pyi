from .channel import END, Bridge, Sent
from .collectives import background_group, from_main, is_distributed, is_rank_zero, together, wait_for_all
from .dtensor import holds_first, is_sharded, local, local_region, reshard, row_norms, to_cpu_copy, whole
from .fake import fake_world
from .parallel_map import in_step, spread, spread_in_batches
from .parallelism import Parallelism, layout_problems, parallelism_problems
from .world import SINGLE_PROCESS, World, is_first_on_host, is_under_torchrun, start_world, world_size

__all__ = [
    "END",
    "SINGLE_PROCESS",
    "Bridge",
    "Parallelism",
    "Sent",
    "World",
    "background_group",
    "fake_world",
    "from_main",
    "holds_first",
    "in_step",
    "is_distributed",
    "is_first_on_host",
    "is_rank_zero",
    "is_sharded",
    "is_under_torchrun",
    "layout_problems",
    "local",
    "local_region",
    "parallelism_problems",
    "reshard",
    "row_norms",
    "spread",
    "spread_in_batches",
    "start_world",
    "to_cpu_copy",
    "together",
    "wait_for_all",
    "whole",
    "world_size",
]
