from .channel import END, Channel, PendingSend
from .collectives import background_group, barrier, broadcast_object, is_distributed, is_rank_zero, raise_on_all_ranks
from .dtensor import full_tensor, is_first_replica, is_sharded, local_slices, reshard, row_norms, to_cpu_copy, to_local
from .map import lockstep_forwards, parallel_map, parallel_map_batched
from .parallelism import Parallelism, mesh_problems, parallelism_problems
from .world import SINGLE_PROCESS, World, fake_world, is_first_on_host, is_under_torchrun, start_world, world_size

__all__ = [
    "END",
    "SINGLE_PROCESS",
    "Channel",
    "Parallelism",
    "PendingSend",
    "World",
    "background_group",
    "barrier",
    "broadcast_object",
    "fake_world",
    "full_tensor",
    "is_distributed",
    "is_first_on_host",
    "is_first_replica",
    "is_rank_zero",
    "is_sharded",
    "is_under_torchrun",
    "local_slices",
    "lockstep_forwards",
    "mesh_problems",
    "parallel_map",
    "parallel_map_batched",
    "parallelism_problems",
    "raise_on_all_ranks",
    "reshard",
    "row_norms",
    "start_world",
    "to_cpu_copy",
    "to_local",
    "world_size",
]
