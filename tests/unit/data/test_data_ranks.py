"""Processes that share the batches of a dataset: together they see what one process sees, in the same order."""

import pytest
import torch
from test_data_loader import make, numbered, stream

from kdtune import data
from kdtune.constants import IGNORE_INDEX
from kdtune.data import Batch

DATASETS = {"map": numbered, "stream": stream}


def rounds(
    kind: str, num_ranks: int, count: int, start: tuple[int, int] = (0, 0)
) -> tuple[list[Batch], list[tuple[int, int]]]:
    """The batches of `count` rounds of all ranks, those without a label left out, and the position after each round."""
    loaders = [make(DATASETS[kind](), rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
    found, positions = [], []
    for loader in loaders:
        loader.seek(start)
    for _ in range(count):
        found += [next(loader) for loader in loaders]
        (position,) = {loader.position for loader in loaders}
        positions.append(position)
    return [batch for batch in found if batch.num_valid_tokens], positions


def same(found: list[Batch], expected: list[Batch]) -> bool:
    return len(found) == len(expected) and all(
        torch.equal(one.tokens, other.tokens) and torch.equal(one.labels, other.labels)
        for one, other in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("kind", DATASETS)
@pytest.mark.parametrize("num_ranks", [2, 3, 4, 7])
def test_together_they_are_one(kind: str, num_ranks: int) -> None:
    """Six batches an epoch, two epochs: with 4 ranks the second round of an epoch has two, with 7 the only one has six."""
    alone, positions = rounds(kind, 1, 12)
    assert positions[5] == (1, 0) and positions[11] == (2, 0)
    rounds_per_epoch = -(-6 // num_ranks)
    together, ends = rounds(kind, num_ranks, 2 * rounds_per_epoch)
    assert same(together, alone)
    assert ends[rounds_per_epoch - 1] == (1, 0) and ends[-1] == (2, 0)


@pytest.mark.parametrize("kind", DATASETS)
def test_from_a_position_that_other_ranks_have_left(kind: str) -> None:
    """Three ranks stop after a round; two go on from there."""
    alone, _ = rounds(kind, 1, 12)
    _, (position,) = rounds(kind, 3, 1)
    assert position == (0, 3)
    rest, positions = rounds(kind, 2, 2, start=position)
    assert same(rest, alone[3:6]) and positions == [(0, 5), (1, 0)]


def test_a_rank_without_a_batch_computes_on_one_without_a_label() -> None:
    last = make(numbered(), rank=6, num_ranks=7)
    batch = next(last)
    assert batch.tokens.shape == (1, 1) and batch.labels.tolist() == [[IGNORE_INDEX]]
    assert batch.num_tokens == batch.num_valid_tokens == 0


def test_validation_gives_every_rank_as_many() -> None:
    alone = list(data.batches(numbered(), 4, 0))
    shares = [list(data.batches(numbered(), 4, 0, rank=rank, num_ranks=4)) for rank in range(4)]
    assert [len(share) for share in shares] == [2, 2, 2, 2]
    assert same([shares[0][0], shares[1][0], shares[2][0], shares[3][0], shares[0][1], shares[1][1]], alone)
    assert shares[2][1].num_valid_tokens == shares[3][1].num_valid_tokens == 0
