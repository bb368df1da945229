"""A process by itself is a world, in which every sum is the identity."""

from dataclasses import replace

import pytest
import torch

from kdtune.distributed import SINGLE_PROCESS, Channel, World

CPU = torch.device("cpu")


def test_a_single_process() -> None:
    world = SINGLE_PROCESS
    assert world == World(CPU) and world.is_main and not world.is_teacher and not world.has_group
    assert (world.dp_rank, world.dp_size) == (0, 1)
    assert world.sum([0.1, 2.0]) == [0.1, 2.0] and world.sum([]) == []
    assert world.any(True) and not world.any(False)
    value = object()  # not even pickled
    assert world.gather(value) == [value] and world.broadcast(value) is value


@pytest.mark.parametrize(("rank", "size", "tp", "expected"), [(5, 8, 2, (2, 4)), (5, 8, 1, (5, 8)), (3, 4, 4, (0, 1))])
def test_shares_of_the_data(rank: int, size: int, tp: int, expected: tuple[int, int]) -> None:
    world = World(CPU, rank, size, tp)
    assert (world.dp_rank, world.dp_size) == expected


def test_the_teachers_side_has_no_main_process() -> None:
    # Of five processes, the last two hold the teacher; each side has a rank 0 of its own.
    ends = [Channel(rank, 3, 2, CPU, None, None) for rank in range(5)]
    worlds = [World(CPU, rank if rank < 3 else rank - 3, 2 if rank > 2 else 3, channel=ends[rank]) for rank in range(5)]
    assert [world.is_main for world in worlds] == [True, False, False, False, False]
    assert [world.is_teacher for world in worlds] == [False, False, False, True, True]
    assert replace(worlds[3], channel=None).is_main
