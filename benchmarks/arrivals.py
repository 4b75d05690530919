"""Conversations that begin when they like, whatever the servers do: an open loop, and a closed one to find their limit.

A client asks, reads the stream, thinks, asks again with the answer before its question. It asks nothing twice: one that
is turned away leaves, and the rest of its conversation is never sent. Knows the wire; not who answers.
"""

import asyncio
import itertools
import json
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks.command import say
from benchmarks.timed_model import WORDS

_BACK_SECONDS = 0.2
"""After which a client of the closed loop that was turned away comes back."""


@dataclass(frozen=True)
class Talk:
    """What a conversation is like."""

    num_turns: int = 3
    first_words: int = 60
    """Words of the first question; no two conversations begin alike."""

    next_words: int = 20
    """Words of each further question."""

    num_tokens: int = 10
    """Length of each answer."""

    think_seconds: float = 0.3
    """Between an answer's end and the next question."""


@dataclass
class Answer:
    """One request, as its client saw it. Times are those of the monotonic clock."""

    sent: float
    late_seconds: float = 0.0
    """How much later than planned it was sent: what this program itself is behind."""

    status: int | None = None
    """None: there was none, or not yet."""

    arrivals: list[float] = field(default_factory=list)
    """When each piece of text came."""

    text: str = ""
    """What was answered, errors too."""

    ended: float | None = None
    """When the last event of a whole answer came; None: it has not come."""

    left: float | None = None
    """When its client gave it up, because the measurement was over."""

    @property
    def is_refused(self) -> bool:
        """Whether it was turned away."""
        return self.status in (429, 503)

    @property
    def is_whole(self) -> bool:
        """Whether the answer came to its end."""
        return self.ended is not None

    @property
    def is_lost(self) -> bool:
        """Whether it came to no end of its own: an error, half an answer, a cut connection."""
        return not (self.is_whole or self.is_refused or self.left is not None)

    @property
    def first_seconds(self) -> float | None:
        """Until the first token; None if there was none."""
        return self.arrivals[0] - self.sent if self.arrivals else None

    @property
    def gaps(self) -> list[float]:
        """Seconds between neighbouring tokens."""
        return [later - earlier for earlier, later in itertools.pairwise(self.arrivals)]


class Clients:
    """All who ask one address; `answers` has every request that was sent."""

    def __init__(self, client: httpx.AsyncClient, talk: Talk, seed: int) -> None:
        self._client = client
        self._talk = talk
        self._rng = random.Random(seed)
        self._is_over = False
        self.answers: list[Answer] = []

    async def arrive(self, per_second: float, seconds: float, drain_seconds: float) -> None:
        """Let so many conversations a second begin at random (a Poisson stream); then wait for what still runs, at most
        `drain_seconds`, and leave."""
        begin = planned = time.monotonic()
        tasks = []
        while (planned := planned + self._rng.expovariate(per_second)) < begin + seconds:
            await asyncio.sleep(planned - time.monotonic())
            tasks.append(asyncio.create_task(self._converse(planned)))
        await asyncio.sleep(begin + seconds - time.monotonic())
        self._is_over = True
        await _leave(tasks, drain_seconds)

    async def one_by_one(self, num_conversations: int) -> None:
        """So many conversations, with nobody else there.

        Raises:
            LookupError: a request is not answered.
        """
        for _ in range(num_conversations):
            if not (answer := await self._converse(time.monotonic())).is_whole:
                raise LookupError(f"a lone request is not answered: {answer.status} {answer.text}")

    async def crowd(self, num_clients: int, seconds: float) -> None:
        """So many clients, each of which begins its next conversation as soon as one has ended (a closed loop)."""

        async def again_and_again() -> None:
            while True:
                if not (await self._converse(time.monotonic())).is_whole:
                    await asyncio.sleep(_BACK_SECONDS)

        tasks = [asyncio.create_task(again_and_again()) for _ in range(num_clients)]
        await asyncio.sleep(seconds)
        await _leave(tasks, 0)

    async def _converse(self, planned: float) -> Answer:
        """Until it ends, or the measurement is over; the last answer."""
        messages: list[dict[str, str]] = []
        for turn in range(self._talk.num_turns):
            words = self._talk.next_words if turn else self._talk.first_words
            messages.append({"role": "user", "content": " ".join(self._rng.choices(WORDS.split(), k=words))})
            answer = await self._ask(messages, planned)
            if not answer.is_whole or self._is_over:
                break
            messages.append({"role": "assistant", "content": answer.text})
            planned = time.monotonic() + self._talk.think_seconds
            await asyncio.sleep(self._talk.think_seconds)
        return answer

    async def _ask(self, messages: Sequence[dict[str, str]], planned: float) -> Answer:
        answer = Answer(time.monotonic())
        answer.late_seconds = answer.sent - planned
        self.answers.append(answer)
        body = {"messages": messages, "max_tokens": self._talk.num_tokens, "ignore_eos": True, "stream": True}
        try:
            async with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
                answer.status = response.status_code
                if response.status_code == 200:
                    await self._read(response, answer)
                else:
                    answer.text = (await response.aread()).decode()
        except httpx.HTTPError as error:
            say(f"a request is lost: {error!r}")
        except asyncio.CancelledError:
            answer.left = time.monotonic()
            raise
        return answer

    async def _read(self, response: httpx.Response, answer: Answer) -> None:
        reason = None
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                event: dict[str, Any] = json.loads(line[6:])
                for choice in event.get("choices", ()):
                    if text := choice["delta"].get("content"):
                        answer.arrivals.append(time.monotonic())
                        answer.text += text
                    reason = choice.get("finish_reason") or reason
            elif line == "data: [DONE]" and reason == "length":
                answer.ended = time.monotonic()


@asynccontextmanager
async def clients(url: str, talk: Talk, seed: int) -> AsyncIterator[Clients]:
    """Clients with a connection for each request at once."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
    async with httpx.AsyncClient(base_url=url, timeout=600, trust_env=False, limits=limits) as client:
        yield Clients(client, talk, seed)


async def _leave(tasks: Sequence["asyncio.Task[Any]"], seconds: float) -> None:
    if tasks:
        await asyncio.wait(tasks, timeout=seconds)
    for task in tasks:
        task.cancel()
    for failure in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(failure, Exception):
            raise failure
