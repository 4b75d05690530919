"""Intervals against published and independently computed values."""

import numpy
import pytest
from scipy import stats

from ultrafuser.gating.evaluation.benchmarks.intervals import bootstrap_interval, wilson_interval


@pytest.mark.parametrize(("right", "items", "low", "high"), [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605)])
def test_wilsons_interval_has_the_values_of_newcombes_table(right, items, low, high):
    # Newcombe (1998), Statistics in Medicine 17, table I, method 3.
    assert wilson_interval(right, items) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("right", "items"), [(0, 20), (1, 29), (20, 20), (1, 1), (700, 1319)])
def test_wilsons_interval_is_scipys_and_stays_within_zero_and_one(right, items):
    expected = stats.binomtest(right, items).proportion_ci(method="wilson")
    low, high = wilson_interval(right, items)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert 0.0 <= low < high <= 1.0


def test_the_bootstrap_of_a_mean_is_that_of_normal_theory_for_many_items():
    values = numpy.random.default_rng(5).uniform(size=400)
    low, high = bootstrap_interval(values.tolist(), [1.0] * 400, seed=0)
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.003)


def test_the_bootstrap_draws_whole_questions():
    # Ten questions, each all right or all wrong, of many judgements: as uncertain as ten coins, not as a thousand.
    low, high = bootstrap_interval([100.0, 0.0] * 5, [100.0] * 10, seed=0)
    assert (low, high) == pytest.approx((0.2, 0.8), abs=0.101)


def test_the_bootstrap_is_the_same_for_the_same_seed():
    values, ones = numpy.random.default_rng(3).uniform(size=50).tolist(), [1.0] * 50
    assert bootstrap_interval(values, ones, seed=1) == bootstrap_interval(values, ones, seed=1)
    assert bootstrap_interval(values, ones, seed=1) != bootstrap_interval(values, ones, seed=2)


def test_a_share_is_of_the_questions_that_were_drawn():
    # All right, whatever is drawn, though questions differ in size.
    assert bootstrap_interval([1.0, 5.0, 20.0], [1.0, 5.0, 20.0], seed=0) == pytest.approx((1.0, 1.0))
