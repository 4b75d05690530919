"""Many short chat requests at once, some of whose clients leave; every one of them is accounted for."""

import asyncio
import json
import random

import httpx
from pydantic import ConfigDict

from benchmarks.measure import Frozen

MAX_TOKENS = 8
LEAVE_WITHIN_SECONDS = 0.1
"""A client that leaves a response that is no stream does so at a random moment within this time."""


class Counts(Frozen):
    """How requests have ended."""

    model_config = ConfigDict(frozen=False, extra="forbid")

    completed: int = 0
    """With a whole response."""

    left: int = 0
    """Because their client wished to leave."""

    refused: int = 0
    """With a status of 429 or 503."""

    lost: int = 0
    """In any other way: an error, half a response, a cut connection."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.completed + self.left + self.refused + self.lost


class Storm:
    """Sends requests of random kinds, reproducibly."""

    def __init__(self, client: httpx.AsyncClient, num_concurrent: int, leaving_share: float, seed: int = 0) -> None:
        self._client = client
        self._num_concurrent = num_concurrent
        self._leaving_share = leaving_share
        self._rng = random.Random(seed)
        self.counts = Counts()

    async def send(self, count: int) -> None:
        """So many requests; returns when all have ended."""
        waiting = iter(range(count))

        async def one_after_the_other() -> None:
            for _ in waiting:
                await self._one()

        await asyncio.gather(*(one_after_the_other() for _ in range(self._num_concurrent)))

    async def _one(self) -> None:
        leaves = self._rng.random() < self._leaving_share
        is_stream = self._rng.random() < 0.5
        body = {
            "messages": [{"role": "user", "content": "x" * self._rng.randrange(1, 200)}],
            "max_tokens": self._rng.randrange(1, MAX_TOKENS + 1),
            "stream": is_stream,
        }
        try:
            status = await (self._stream(body, leaves) if is_stream else self._whole(body, leaves))
        except (httpx.HTTPError, ValueError, LookupError):
            status = None
        if leaves and status in (200, 0):
            self.counts.left += 1
        elif status == 200:
            self.counts.completed += 1
        elif status in (429, 503):
            self.counts.refused += 1
        else:
            self.counts.lost += 1

    async def _whole(self, body: dict[str, object], leaves: bool) -> int | None:
        """The status of a whole response; None if it is not one; 0 if the client has left."""
        asking = self._client.post("/v1/chat/completions", json=body)
        if leaves:
            try:
                return (await asyncio.wait_for(asking, self._rng.random() * LEAVE_WITHIN_SECONDS)).status_code
            except TimeoutError:
                return 0
        response = await asking
        if response.status_code != 200:
            return response.status_code
        return 200 if response.json()["choices"][0]["finish_reason"] in ("stop", "length") else None

    async def _stream(self, body: dict[str, object], leaves: bool) -> int | None:
        """As `_whole`; a client that leaves does so after a random number of events."""
        num_events = self._rng.randrange(MAX_TOKENS) if leaves else None
        async with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                return response.status_code
            events: list[str] = []
            if num_events == 0:
                return 0
            async for line in response.aiter_lines():
                if line.startswith("data: "):
                    events.append(line.removeprefix("data: "))
                if len(events) == num_events:
                    return 0
        is_whole = events[-1] == "[DONE]" and json.loads(events[-2])["choices"][0]["finish_reason"]
        return 200 if is_whole else None
