"""Means, standard errors and differences against numpy and scipy."""

import numpy as np
import pytest
from scipy import stats

from kdtune.sweeps import difference, summarize


def test_mean_and_standard_error() -> None:
    for n in range(2, 9):
        values = np.random.default_rng(n).normal(0.5, 0.1, n)
        found = summarize(list(values))
        assert found.n == n
        assert found.mean == pytest.approx(values.mean(), rel=1e-12)
        assert found.standard_error == pytest.approx(values.std(ddof=1) / np.sqrt(n), rel=1e-12)
        assert found.standard_error == pytest.approx(stats.sem(values), rel=1e-12)


def test_one_value_has_no_error() -> None:
    assert summarize([0.25]) == summarize((0.25,)) and summarize([0.25]).standard_error is None


def test_paired_by_seed_whatever_the_order() -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 5))
    found = difference(dict(zip("vwxyz", a, strict=True)), dict(reversed(list(zip("vwxyz", b, strict=True)))))
    assert found.kind == "paired"
    assert found.value == pytest.approx((a - b).mean())
    assert found.in_standard_errors == pytest.approx(stats.ttest_rel(a, b).statistic, rel=1e-12)


def test_two_samples() -> None:
    a, b = np.random.default_rng(1).normal(size=5), np.random.default_rng(2).normal(size=3)
    found = difference(dict(enumerate(a)), dict(enumerate(b)))
    assert found.kind == "two-sample"
    assert found.in_standard_errors == pytest.approx(stats.ttest_ind(a, b, equal_var=False).statistic, rel=1e-12)


def test_unknown_and_zero_errors_give_no_ratio() -> None:
    assert difference({0: 1.0}, {0: 0.5}).in_standard_errors is None
    assert difference({0: 1.0, 1: 2.0}, {None: 0.5}).in_standard_errors is None
    assert difference({0: 1.0, 1: 1.0}, {0: 0.5, 1: 0.5}).in_standard_errors is None
    assert difference({0: 1.0, 1: 1.0}, {0: 0.5, 1: 0.5}).value == 0.5
