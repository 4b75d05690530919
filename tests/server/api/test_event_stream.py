"""A silent stream gets comments between its events, and what makes the events ends with the client; every event is one
line, however lines are counted."""

import asyncio
import json
from collections.abc import AsyncGenerator
from itertools import pairwise
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.types import Message
from vllm.exceptions import VLLMValidationError

from tests.server.scripted import ScriptedEngine
from ultrafuser.server.api.response import EventStream
from ultrafuser.server.dialects import OPENAI
from ultrafuser.server.errors import ShuttingDown

INTERVAL_SECONDS = 0.05
SILENCE_SECONDS = 20 * INTERVAL_SECONDS
LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
EVENTS = ["data: one\n\n", "data: two\n\n", "data: [DONE]\n\n"]


class Stream:
    """A stream that is silent before its last events, and a client that may leave."""

    def __init__(self, interval_seconds: float, path: str = "/v1/chat/completions") -> None:
        self.path = path
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
        await EventStream(self.events())(
            {"type": "http", "path": self.path, "app": self.app}, self._receive, self._send
        )
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


async def longest_silence() -> float:
    """Seconds between two messages of a stream, at most."""
    stream = Stream(INTERVAL_SECONDS)
    times: list[float] = []
    send = stream._send

    async def note(message: Message) -> None:
        times.append(asyncio.get_running_loop().time())
        await send(message)

    stream._send = note  # type: ignore[method-assign]
    await stream.run()
    return max(after - before for before, after in pairwise(times))


async def test_a_silence_is_never_much_longer_than_the_interval() -> None:
    """It was twice as long, always: looks came at fixed times. A busy machine may be late, not three times."""
    assert min([await longest_silence() for _ in range(3)]) < 1.9 * INTERVAL_SECONDS


async def test_anthropics_clients_get_pings() -> None:
    bodies = await Stream(INTERVAL_SECONDS, "/v1/messages").run()
    assert set(bodies) - set(EVENTS) == {'event: ping\ndata: {"type": "ping"}\n\n'}


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


TEXT = f"a{LINE_ENDS}b"
CHAT_ECHO: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": TEXT}],
    "echo": True,
    "continue_final_message": True,
    "add_generation_prompt": False,
}
ECHOES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", CHAT_ECHO),
    ("/v1/chat/completions", CHAT_ECHO | {"gate_weights": True}),
    ("/v1/completions", {"prompt": TEXT, "echo": True}),
    ("/v1/completions", {"prompt": TEXT, "echo": True, "gate_weights": True}),
]


@pytest.mark.filterwarnings("ignore:max_tokens is deprecated:DeprecationWarning")
@pytest.mark.parametrize(("path", "body"), ECHOES)
async def test_no_event_is_cut_where_unicode_ends_a_line(
    client: httpx.AsyncClient, path: str, body: dict[str, Any]
) -> None:
    """Clients that split at all ends of lines that Unicode knows got broken JSON."""
    whole = (await client.post(path, json=body)).json()["choices"][0]
    wanted = whole["text"] if "text" in whole else whole["message"]["content"]
    assert TEXT in wanted
    async with client.stream("POST", path, json=body | {"stream": True}) as response:
        lines = [line async for line in response.aiter_lines()]
    *events, last = [line.removeprefix("data: ") for line in lines if line]
    assert last == "[DONE]"
    choices = [choice for event in events for choice in json.loads(event)["choices"]]
    assert "".join(
        choice["text"] if "text" in choice else choice["delta"].get("content", "") for choice in choices
    ) == (wanted)


@pytest.mark.filterwarnings("ignore:max_tokens is deprecated:DeprecationWarning")
async def test_an_error_is_not_cut_there_either(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.failure, engine.fails_at = VLLMValidationError(TEXT), 2
    body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}
    text = (await client.post("/v1/chat/completions", json=body)).text
    *_, error, last = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert (json.loads(error)["error"]["message"], last) == (TEXT, "[DONE]")
    assert OPENAI.last_events(ShuttingDown()).isascii()
