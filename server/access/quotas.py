"""What one API key may use: requests within a minute, and requests at once. Knows time and numbers only."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ultrafuser.server.errors import RateLimited

MINUTE_SECONDS = 60.0

Clock = Callable[[], float]


class MinuteWindow:
    """Lets at most so many requests pass within any 60 seconds."""

    def __init__(self, limit: int, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._passed: deque[float] = deque(maxlen=limit)

    def take(self) -> float:
        """0 if one more may pass, which is then counted; else the seconds until one may."""
        now = self._clock()
        if len(self._passed) == self._passed.maxlen and now - self._passed[0] < MINUTE_SECONDS:
            return self._passed[0] + MINUTE_SECONDS - now
        self._passed.append(now)
        return 0.0


class Quota:
    """One key's share of the server."""

    def __init__(self, per_minute: int | None, at_once: int | None, clock: Clock = time.monotonic) -> None:
        """None: no limit."""
        self._window = None if per_minute is None else MinuteWindow(per_minute, clock)
        self._per_minute = per_minute
        self._at_once = at_once
        self._num_running = 0

    @contextmanager
    def use(self) -> Iterator[None]:
        """One request while it runs.

        Raises:
            RateLimited: it would be one too many. It does not count then.
        """
        if self._at_once is not None and self._num_running >= self._at_once:
            raise RateLimited(f"This key may have {self._at_once} requests running at once.", "concurrency", 1)
        wait_seconds = self._window.take() if self._window is not None else 0
        if wait_seconds:
            raise RateLimited(f"This key may send {self._per_minute} requests a minute.", "rate_limit", wait_seconds)
        self._num_running += 1
        try:
            yield
        finally:
            self._num_running -= 1
