"""Means, standard errors and differences against numpy and scipy."""

import numpy as np
import pytest
from scipy import stats

from kdtune.reports import difference, summarize
from kdtune.reports.statistics import t_bound


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
    expected = stats.ttest_ind(a, b, equal_var=False)
    assert found.in_standard_errors == pytest.approx(expected.statistic, rel=1e-12)
    assert found.degrees == pytest.approx(expected.df, rel=1e-12) and found.counts == (5, 3)


def test_bounds_of_t_are_scipys_and_never_too_narrow() -> None:
    for degrees in (*range(1, 31), 40, 60, 100):
        assert t_bound(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), abs=6e-4)
    for degrees in np.linspace(1, 300, 997):
        assert t_bound(degrees) >= stats.t.ppf(0.975, degrees) - 6e-4


def test_the_bound_is_that_of_the_p_value() -> None:
    """Three paired seeds: 2 standard errors are no sign of anything, 5 are."""
    draw, seen = np.random.default_rng(3), set()
    for shift in np.linspace(0, 8, 60):
        a, b = draw.normal(size=(2, 3))
        found, test = difference(dict(enumerate(a + shift)), dict(enumerate(b))), stats.ttest_rel(a + shift, b)
        assert found.is_beyond_bound == (test.pvalue < 0.05)
        seen.add((found.is_beyond_bound, abs(test.statistic) > 2))
    assert seen == {(False, False), (False, True), (True, True)}


def test_unknown_and_zero_errors_give_no_ratio() -> None:
    assert difference({0: 1.0}, {0: 0.5}).in_standard_errors is None
    assert difference({0: 1.0, 1: 2.0}, {None: 0.5}).in_standard_errors is None
    assert difference({0: 1.0, 1: 1.0}, {0: 0.5, 1: 0.5}).in_standard_errors is None
    assert difference({0: 1.0, 1: 1.0}, {0: 0.5, 1: 0.5}).value == 0.5
