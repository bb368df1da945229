"""A fake process group: shows what sharding on many ranks does to a model, seen from one rank."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed as dist

from kdtune.distributed.world import World


@contextmanager
def fake_world(size: int, rank: int = 0) -> Iterator[World]:
    """A context with the world that rank `rank` of `size` would see. Collectives return at once; their results are meaningless.

    For models on the meta device. No process group may exist before, and none exists afterwards.
    """
    # Half a second of imports, which no run needs. The first is torch's own, with which it tests its sharding.
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield World(torch.device("cpu"), rank, size)
    finally:
        dist.destroy_process_group()
        # DTensor remembers meshes: a later one of the same shape would get this one's groups.
        _clear_sharding_prop_cache()
