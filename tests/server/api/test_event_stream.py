"""A silent stream gets comments between its events, and what makes the events ends with the client."""

import asyncio
from collections.abc import AsyncGenerator

import pytest
from fastapi import FastAPI
from starlette.types import Message

from ultrafuser.server.api.response import EventStream

INTERVAL_SECONDS = 0.05
SILENCE_SECONDS = 20 * INTERVAL_SECONDS
EVENTS = ["data: one\n\n", "data: two\n\n", "data: [DONE]\n\n"]


class Stream:
    """A stream that is silent before its last events, and a client that may leave."""

    def __init__(self, interval_seconds: float) -> None:
        self.app = FastAPI()
        self.app.state.keep_alive_interval = interval_seconds
        self.sent: list[Message] = []
        self.leaves = asyncio.Event()
        self.is_closed = False

    async def events(self) -> AsyncGenerator[str, None]:
        """One event, silence, the others."""
        try:
            yield EVENTS[0]
            await asyncio.sleep(SILENCE_SECONDS)
            for event in EVENTS[1:]:
                yield event
        finally:
            self.is_closed = True

    async def run(self) -> list[str]:
        """Send everything; the bodies that were sent."""
        await EventStream(self.events())({"type": "http", "app": self.app}, self._receive, self._send)
        return [message["body"].decode() for message in self.sent[1:] if message["body"]]

    async def _receive(self) -> Message:
        await self.leaves.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        self.sent.append(message)


async def test_comments_fill_a_silence_and_touch_no_event() -> None:
    stream = Stream(INTERVAL_SECONDS)
    bodies = await stream.run()
    assert [body for body in bodies if body.startswith("data: ")] == EVENTS
    assert set(bodies) - set(EVENTS) == {": keep-alive\n\n"}
    assert bodies[0] == EVENTS[0]
    assert bodies[-2:] == EVENTS[1:]
    num_sent = len(stream.sent)
    await asyncio.sleep(3 * INTERVAL_SECONDS)
    assert len(stream.sent) == num_sent  # none after the end


@pytest.mark.parametrize("interval_seconds", [0, 10 * SILENCE_SECONDS])
async def test_a_stream_that_speaks_in_time_gets_none(interval_seconds: float) -> None:
    assert await Stream(interval_seconds).run() == EVENTS


async def test_a_client_that_leaves_closes_the_stream() -> None:
    stream = Stream(INTERVAL_SECONDS)
    running = asyncio.create_task(stream.run())
    await asyncio.sleep(INTERVAL_SECONDS)
    assert not stream.is_closed
    stream.leaves.set()
    bodies = await running
    assert stream.is_closed
    assert EVENTS[1] not in bodies
