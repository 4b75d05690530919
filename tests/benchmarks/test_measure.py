"""Percentiles, ratios and verdicts: small numbers whose answers are known."""

import math

import numpy as np
import pytest

from benchmarks.measure import Bar, Comparison, Measured, paired_ratio, percentile, verdict

AT_MOST = Bar(limit=1.05, direction="at most")
AT_LEAST = Bar(limit=1.4, direction="at least")


def comparison(ratio: float | None, bar: Bar | None, case: str = "batch 8") -> Comparison:
    side = Measured(value=1.0)
    return Comparison(case=case, unit="ms", fused=side, baseline=side, ratio=ratio, bar=bar)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99, 1.0])
def test_percentiles_are_those_of_numpy(share: float) -> None:
    samples = list(np.random.default_rng(0).normal(size=57))
    assert percentile(samples, share) == pytest.approx(np.percentile(samples, 100 * share))


def test_percentile_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="0 samples"):
        percentile([], 0.5)


def test_measured_keeps_median_mean_and_tail_in_the_unit_asked_for() -> None:
    measured = Measured.of([0.001, 0.002, 0.003, 0.010], scale=1000)
    assert measured.value == measured.p50 == pytest.approx(2.5)
    assert measured.mean == pytest.approx(4.0)
    assert measured.p99 == pytest.approx(9.79)
    assert measured.num_samples == 4


def test_a_pair_that_was_disturbed_as_a_whole_does_not_move_the_ratio() -> None:
    assert paired_ratio([1.0, 50.0, 1.1], [1.0, 50.0, 1.0]) == 1.0


def test_pairs_must_be_complete() -> None:
    with pytest.raises(ValueError, match="shorter"):
        paired_ratio([1.0, 2.0], [1.0])


@pytest.mark.parametrize(
    ("bar", "ratio", "is_met"),
    [(AT_MOST, 1.05, True), (AT_MOST, 1.06, False), (AT_LEAST, 1.4, True), (AT_LEAST, 1.39, False)],
)
def test_a_bar_is_met_up_to_its_limit(bar: Bar, ratio: float, is_met: bool) -> None:
    assert bar.is_met_by(ratio) is is_met
    assert comparison(ratio, bar).is_met is is_met


def test_not_a_number_meets_no_bar() -> None:
    assert not AT_MOST.is_met_by(math.nan)
    assert not AT_LEAST.is_met_by(math.nan)


def test_one_missed_bar_fails_the_whole() -> None:
    assert verdict([comparison(1.0, AT_MOST), comparison(2.0, AT_LEAST)]) is True
    assert verdict([comparison(1.0, AT_MOST), comparison(1.0, AT_LEAST)]) is False


def test_what_has_no_bar_is_reported_but_not_judged() -> None:
    assert verdict([comparison(99.0, None)]) is True


def test_one_side_alone_gives_no_verdict() -> None:
    assert verdict([comparison(None, AT_MOST), comparison(1.0, AT_MOST)]) is None


def test_a_case_has_a_name_for_json() -> None:
    assert comparison(1.0, None, "128 requests, 8 to 256 tokens").key == "128_requests_8_to_256_tokens"
