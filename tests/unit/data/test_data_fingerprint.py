"""Fingerprints and lengths of datasets."""

from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from kdtune.data import (
    Dataset,
    DatasetStats,
    Example,
    MapDataset,
    MixedDataset,
    MixedStream,
    TokenizedDataset,
    make_example,
)
from kdtune.data.dataset import StreamDataset

ROWS = [([1, 2, 3], [False, True, True]), ([4, 5], [False, True])]


def tokenized(rows: Sequence[tuple[list[int], list[bool]]] = ROWS) -> TokenizedDataset:
    return TokenizedDataset(rows, DatasetStats("rows", rows=len(rows)))


class Lazy(MapDataset):
    """A user's own, which says nothing of itself."""

    report = DatasetStats("lazy")

    def __init__(self, count: int, change: int = 0) -> None:
        self._count, self._change = count, change

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Example:
        return make_example([index, self._change], [True, True])


class Stream(StreamDataset):
    report = DatasetStats("stream")

    def __init__(self, first: int) -> None:
        self._first = first

    def examples(self, *, seed: int, epoch: int, shuffle: bool) -> Iterator[Example]:
        return (make_example([self._first + index, 1], [True, True]) for index in range(1000))


@pytest.mark.parametrize(
    "other",
    [
        ROWS[::-1],
        [*ROWS, ROWS[0]],
        [([1, 2, 3], [False, True, False]), ROWS[1]],
        [([1, 2, 9], [False, True, True]), ROWS[1]],
        [([1, 2, 3, 4], [False, True, True, False]), ([5], [True])],
    ],
    ids=["order", "more", "trained tokens", "tokens", "cut elsewhere"],
)
def test_what_changes_a_dataset_in_memory(other: list[tuple[list[int], list[bool]]]) -> None:
    assert tokenized().fingerprint() == tokenized().fingerprint()
    assert tokenized().fingerprint() != tokenized(other).fingerprint()
    assert tokenized().fingerprint().startswith("2 examples, ")


def test_mixtures() -> None:
    parts = [tokenized(), Lazy(5)]
    mixed = MixedDataset(parts, [0.5, 0.5], 8)
    assert mixed.fingerprint() == MixedDataset(parts, [0.5, 0.5], 8).fingerprint()
    assert mixed.fingerprint() != MixedDataset(parts, [0.25, 0.75], 8).fingerprint()
    assert mixed.fingerprint() != MixedDataset([tokenized(), Lazy(5, change=1)], [0.5, 0.5], 8).fingerprint()
    streams = [MixedStream([Stream(first), tokenized()], [0.5, 0.5]) for first in (0, 0, 1)]
    assert streams[0].fingerprint() == streams[1].fingerprint() != streams[2].fingerprint()


@pytest.mark.parametrize(
    ("one", "other"), [(Lazy(1000), Lazy(1000, change=1)), (Lazy(7), Lazy(8)), (Stream(0), Stream(1))]
)
def test_of_what_is_not_in_memory_some_examples_stand_for_all(one: Dataset, other: Dataset) -> None:
    assert one.fingerprint() == one.fingerprint() != other.fingerprint()


def test_lengths() -> None:
    assert tokenized().lengths == [3, 2]
    assert MixedDataset([tokenized(), tokenized()], [0.5, 0.5]).lengths == [3, 2, 3, 2]
    for unknown in (Lazy(3), Stream(0), MixedDataset([tokenized(), Lazy(3)], [0.5, 0.5])):
        assert unknown.lengths is None
    assert np.asarray(tokenized().lengths).max() == len(tokenized()[0].tokens)
