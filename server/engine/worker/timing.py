"""How long the parts of a step take, measured without waiting: by the clock on the CPU, by events in a GPU's stream.

Knows names of parts, not what they do.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ultrafuser.server.engine.shared.step import Span
from ultrafuser.server.engine.worker.transfer import to_host

_MOST_REMEMBERED = 256
"""Measurements that wait to be taken: those of a few steps."""


class _ClockMark:
    """A moment in this process."""

    is_past = True

    def __init__(self) -> None:
        self._seconds = time.perf_counter()

    def seconds_since(self, start: "_ClockMark") -> float:
        return self._seconds - start._seconds


class _StreamMark:
    """A moment in the device's current stream; known once the device has come to it."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record()

    @property
    def is_past(self) -> bool:
        return bool(self._event.query())

    def seconds_since(self, start: "_StreamMark") -> float:
        return float(start._event.elapsed_time(self._event)) / 1000


class StepClock:
    """Measures parts of steps and hands out what is known by now: on a GPU often that of the step before."""

    def __init__(self, device: torch.device) -> None:
        self._mark: Callable[[], Any] = _ClockMark if device.type == "cpu" else _StreamMark
        # Nobody asks the ranks whose output is not used; they must not remember for ever.
        self._running: deque[tuple[str, str | None, Any, Any]] = deque(maxlen=_MOST_REMEMBERED)
        self._heard: deque[tuple[Tensor, Any, Callable[[Tensor], list[Span]]]] = deque(maxlen=_MOST_REMEMBERED)

    @contextmanager
    def measure(self, part: str, specialist: str | None = None) -> Iterator[None]:
        """Time the work of the `with` block."""
        start = self._mark()
        yield
        self._running.append((part, specialist, start, self._mark()))

    def forward(self, specialist: str, num_tokens: int, num_requests: int) -> AbstractContextManager[None]:
        """Time a forward pass: a "prefill" if a prompt is in it, a "decode" if each request goes on by one token.

        Drafts that are verified do not count as tokens.
        """
        if num_tokens == 0:
            return nullcontext()
        return self.measure("prefill" if num_tokens > num_requests else "decode", specialist)

    def hear(self, told: Tensor, spans_of: Callable[[Tensor], list[Span]]) -> None:
        """Take note of what other ranks have measured, once it is on the host."""
        self._heard.append((to_host(told), self._mark(), spans_of))

    def take(self, most: int = _MOST_REMEMBERED) -> list[Span]:
        """What has ended and was not taken yet, in order, at most so many; then all that was heard."""
        spans: list[Span] = []
        while self._running and self._running[0][3].is_past and len(spans) < most:
            part, specialist, start, end = self._running.popleft()
            spans.append(Span(part, specialist, end.seconds_since(start)))
        while self._heard and self._heard[0][1].is_past:
            told, _, spans_of = self._heard.popleft()
            spans += spans_of(told)
        return spans
