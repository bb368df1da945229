"""Rows that differ by process are found, whichever dataset they are of."""

import pytest

from kdtune.data import DatasetStats, TokenizedDataset
from kdtune.errors import DataError
from kdtune.training.inputs import _check_same_rows


def rows(first: int) -> str:
    return TokenizedDataset([([first, 2], [False, True])], DatasetStats("rows")).fingerprint()


def test_the_same_rows_pass() -> None:
    _check_same_rows("dataset_val", [rows(1)] * 3)


def test_each_kind_of_rows_is_listed_with_its_ranks() -> None:
    with pytest.raises(DataError) as refused:
        _check_same_rows("dataset_val", [rows(1), rows(5), rows(1), rows(5)])
    listed = f"dataset_val: the processes have different rows (rank 0, 2: {rows(1)}; rank 1, 3: {rows(5)}); "
    assert str(refused.value).startswith(listed)
