"""A server's own time is what callers without work of their own would need; a run is held against it."""

import pytest

from benchmarks.command import Options
from benchmarks.data_throughput import QUICK, Sizes, compare, makespan, measure
from benchmarks.timed_model import Served


@pytest.mark.parametrize(
    ("durations", "concurrency", "seconds"),
    [([1.0] * 4, 4, 1.0), ([1.0] * 5, 4, 2.0), ([3.0, 1.0, 1.0, 1.0], 2, 3.0), ([1.0, 2.0], 64, 2.0)],
)
def test_calls_begin_as_soon_as_a_caller_is_free(durations, concurrency, seconds):
    assert makespan(durations, concurrency) == seconds


def test_stages_follow_each_other_and_a_pause_between_them_counts_against_the_run():
    served = [Served("topics", 0.0, 1.0), Served("", 1.5, 2.5), Served("", 1.5, 2.5), Served("", 2.6, 3.6)]
    responses, everything, full = compare(served, 2)
    assert responses.ratio == pytest.approx(2.1 / 2.0)
    assert everything.ratio == pytest.approx(3.6 / 3.0)
    assert full.ratio == pytest.approx(3.6 / 2.0)
    assert responses.bar == everything.bar is not None
    assert everything.is_met is False


def test_a_quick_run_is_served_whole():
    assert Sizes() != QUICK
    responses, everything, _ = measure(Options(quick=True))
    assert responses.note == "60 calls"
    assert everything.ratio is not None
    assert everything.ratio > 0.95
