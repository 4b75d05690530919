"""Two ways of generating, advanced step by step in turns, so that whatever disturbs the machine disturbs both.

Knows that a side can be started, stepped and asked how far it is; knows no engine.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from benchmarks.workload import Request

NUM_UNCOUNTED = 2
"""Steps at the beginning of a block."""


class Stepper(Protocol):
    """Something that generates tokens for a batch of requests."""

    def start(self, requests: Sequence[Request]) -> None:
        """Take requests and compute until each has its first token."""

    def step(self) -> object:
        """One decode step."""

    def stop(self) -> None:
        """Forget the requests, finished or not."""


class Job(Protocol):
    """A fixed amount of work, done step by step."""

    @property
    def progress(self) -> float:
        """Share of the work that is done, 0 to 1."""

    def step(self) -> object:
        """A little more of it."""


@dataclass
class Round:
    """Seconds of each step of one block per side, measured one right after the other."""

    fused: list[float] = field(default_factory=list)
    baseline: list[float] = field(default_factory=list)


def alternate(
    fused: Stepper | None, baseline: Stepper | None, requests: Sequence[Request], num_rounds: int, num_steps: int
) -> list[Round]:
    """Step both sides through the same requests, in blocks of `num_steps` steps that take turns.

    The side that goes first changes from round to round. Each block begins with two steps that are not counted: they
    bring the side's own data back into the processor's caches, and where steps are scheduled ahead, the second waits
    for what the other side had left under way. A side that is None is left out.
    """
    sides = [(name, side) for name, side in (("fused", fused), ("baseline", baseline)) if side is not None]
    for _, side in sides:
        side.start(requests)
    rounds = []
    for index in range(num_rounds):
        measured = Round()
        for name, side in sides if index % 2 == 0 else sides[::-1]:
            for _ in range(NUM_UNCOUNTED):
                side.step()
            setattr(measured, name, [_seconds(side) for _ in range(num_steps)])
        rounds.append(measured)
    for _, side in sides:
        side.stop()
    return rounds


def race(jobs: Sequence[Job], num_steps: int) -> list[float]:
    """Seconds that each job takes in all; the one that is behind does the next `num_steps` steps."""
    seconds = [0.0] * len(jobs)
    while min(job.progress for job in jobs) < 1:
        index = min(range(len(jobs)), key=lambda i: jobs[i].progress)
        for _ in range(num_steps):
            if jobs[index].progress < 1:
                seconds[index] += _seconds(jobs[index])
    return seconds


def _seconds(side: Stepper | Job) -> float:
    start = time.perf_counter()
    side.step()
    return time.perf_counter() - start
