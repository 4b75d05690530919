"""Whether the server can take requests: warm, not about to end, and with an engine that gets on with its work.

An engine that hangs still looks alive to everything that only asks whether its process is there: what counts is the age
of its last step. Knows that there are steps and unfinished requests, not what they are.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

MAX_CHECK_SECONDS = 1.0
"""Longest time between two looks at the engine."""

FIRST_STEP_STALLS = 10
"""How many times longer than a later one the first step may take: it may have to compile, or to read weights."""

logger = logging.getLogger(__name__)


@dataclass
class Readiness:
    """What the start and the end of the server have to say about its being ready."""

    is_warm: bool = False
    """A token was produced since the start."""

    is_ending: bool = False
    """A signal has asked the server to end."""

    is_stalled: bool = False
    """The engine has work and makes no steps."""

    def obstacle(self, engine_errored: bool) -> str | None:
        """Why the server cannot take requests; None if it can."""
        if engine_errored:
            return "the engine has stopped"
        if self.is_ending:
            return "shutting down"
        if self.is_stalled:
            return "the engine has work, but makes no steps"
        return None if self.is_warm else "warming up: no token produced yet"


class Engine(Protocol):
    """What has to be known of an engine."""

    @property
    def errored(self) -> bool:
        """Whether it has stopped, for good."""

    def get_num_unfinished_requests(self) -> int:
        """Requests that wait or run."""

    async def is_paused(self) -> bool:
        """Any question that only a living engine answers."""


class Heartbeat:
    """When the engine last had something to show for its work, or nothing to do."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last = clock()

    def beat(self, _report: object = None) -> None:
        """The report of a step has arrived, or there is nothing to do."""
        self._last = self._clock()

    @property
    def age_seconds(self) -> float:
        """Time since the last beat."""
        return self._clock() - self._last


class StallWatch:
    """Keeps `Readiness.is_stalled` up to date: the engine has work, and for too long no step has come."""

    def __init__(self, engine: Engine, heartbeat: Heartbeat, readiness: Readiness, stall_seconds: float) -> None:
        self._engine = engine
        self._heartbeat = heartbeat
        self._readiness = readiness
        self._stall_seconds = stall_seconds

    @property
    def is_lost(self) -> bool:
        """Whether the engine hangs for good, if its ranks can: see `can_hang` in `server/start/launch.py`."""
        allowed = self._stall_seconds * FIRST_STEP_STALLS
        return self._readiness.is_stalled and (self._readiness.is_warm or self._heartbeat.age_seconds > allowed)

    async def run(self) -> None:
        """Watch for as long as the engine lives."""
        try:
            await self._watch()
        except Exception:
            if not self._engine.errored:
                raise

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(min(MAX_CHECK_SECONDS, self._stall_seconds / 4))
            if self._is_late() and not self._readiness.is_stalled:
                self._readiness.is_stalled = True
                logger.error("no step of the engine for %.1f s", self._heartbeat.age_seconds)
                # Its requests may end by their deadlines meanwhile: only an answer shows that it lives again.
                await self._engine.is_paused()
            if self._readiness.is_stalled and not self._is_late():
                self._readiness.is_stalled = False
                logger.warning("the engine makes steps again")

    def _is_late(self) -> bool:
        if self._engine.get_num_unfinished_requests() == 0:
            self._heartbeat.beat()
        return self._heartbeat.age_seconds > self._stall_seconds
