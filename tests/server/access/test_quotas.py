"""A key's limits, on a clock that the test turns."""

import pytest

from ultrafuser.server.access.quotas import MinuteWindow, Quota
from ultrafuser.server.errors import RateLimited


class Clock:
    """Seconds, set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_no_minute_has_more_than_the_limit() -> None:
    clock = Clock()
    window = MinuteWindow(3, clock)
    passed = []
    for _ in range(1000):
        clock.now += 0.7
        if window.take() == 0:
            passed.append(clock.now)
    assert all(late - early >= 60 for early, late in zip(passed, passed[3:], strict=False))
    assert len(passed) == 3 * 12  # 700 seconds hold 11 whole minutes and the beginning of another


def test_the_wait_is_until_the_oldest_is_a_minute_old() -> None:
    clock = Clock()
    window = MinuteWindow(2, clock)
    for _ in range(2):
        assert window.take() == 0
        clock.now += 10
    assert window.take() == pytest.approx(40)
    clock.now += 40
    assert window.take() == 0
    assert window.take() == pytest.approx(10)


def test_a_refused_request_does_not_count() -> None:
    clock = Clock()
    window = MinuteWindow(1, clock)
    window.take()
    for _ in range(50):
        clock.now += 1
        assert window.take() > 0
    clock.now += 10
    assert window.take() == 0


def test_as_many_run_at_once_as_may() -> None:
    quota = Quota(None, 2)
    with quota.use():
        with quota.use(), pytest.raises(RateLimited, match="2 requests running at once") as caught, quota.use():
            pass
        with quota.use():
            pass
    assert (caught.value.reason, caught.value.headers) == ("concurrency", {"Retry-After": "1"})


def test_a_request_that_fails_gives_its_place_back() -> None:
    quota = Quota(None, 1)
    for _ in range(2):
        with pytest.raises(KeyError), quota.use():
            raise KeyError


def test_one_too_many_at_once_is_not_counted_against_the_minute() -> None:
    clock = Clock()
    quota = Quota(2, 1, clock)
    with quota.use(), pytest.raises(RateLimited), quota.use():
        pass
    with quota.use():
        pass
    with pytest.raises(RateLimited, match="2 requests a minute") as caught, quota.use():
        pass
    assert (caught.value.reason, caught.value.headers) == ("rate_limit", {"Retry-After": "60"})


def test_without_limits_everything_passes() -> None:
    quota = Quota(None, None)
    with quota.use(), quota.use():
        pass
