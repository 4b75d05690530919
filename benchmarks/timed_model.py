"""A made-up model behind HTTP, in a process of its own, that takes its time for every call and notes when it worked.

It answers in the form that a call asks for, with words at random, and holds any number of connections. Knows the wire;
does not know what the answers are for.
"""

import asyncio
import json
import multiprocessing
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

MODEL = "timed"
WORDS = (
    "apple bread bridge candle castle circle cloud copper cotton desert doctor engine evening farmer feather forest "
    "garden glass harbour history island journey kitchen ladder letter market mirror morning museum needle number "
    "ocean orange paper pencil planet pocket prison question railway reason recipe river sailor season secret silver "
    "soldier spring station street student summer table teacher thunder ticket travel valley village violin water "
    "window winter yesterday"
)


@dataclass(frozen=True)
class Served:
    """One call, as the server saw it."""

    stage: str
    """Name of the schema that it asked for; empty for plain text."""

    begin: float
    """When it had arrived, in seconds of the machine's monotonic clock."""

    end: float
    """When its answer had been sent."""


class TimedModel:
    """A running server."""

    def __init__(self, process: Any, pipe: Connection) -> None:
        self._process = process
        self._pipe = pipe
        self.base_url = f"http://127.0.0.1:{pipe.recv()}/v1"

    def stop(self) -> list[Served]:
        """End it; returns all calls in the order of their answers."""
        self._pipe.send(None)
        served = [Served(*call) for call in self._pipe.recv()]
        self._process.join()
        return served

    def kill(self) -> None:
        """End it whatever it does."""
        if self._process.is_alive():
            self._process.kill()
        self._process.join()


@contextmanager
def timed_model(call_seconds: float) -> Iterator[TimedModel]:
    """A server for as long as the block runs; calls take `call_seconds` on average, from half of it to half more."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, call_seconds), daemon=True)
    process.start()
    model = TimedModel(process, ours)
    try:
        yield model
    finally:
        model.kill()


def _serve(pipe: Connection, call_seconds: float) -> None:
    asyncio.run(_main(pipe, call_seconds))


async def _main(pipe: Connection, call_seconds: float) -> None:
    served: list[tuple[str, float, float]] = []

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while body := await _read_body(reader):
                begin = time.monotonic()
                stage, content = _answer(body)
                wanted = call_seconds * (0.5 + random.Random(body["seed"]).random())
                await asyncio.sleep(begin + wanted - time.monotonic())
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(content), content))
                await writer.drain()
                served.append((stage, begin, time.monotonic()))
        finally:
            writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0, backlog=256)
    pipe.send(server.sockets[0].getsockname()[1])
    await asyncio.to_thread(pipe.recv)
    pipe.send(served)


async def _read_body(reader: asyncio.StreamReader) -> dict[str, Any] | None:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
    except asyncio.IncompleteReadError:
        return None  # the client has left
    length = int(head.partition(b"content-length:")[2].split(b"\r\n")[0])
    body: dict[str, Any] = json.loads(await reader.readexactly(length))
    return body


def _answer(body: dict[str, Any]) -> tuple[str, bytes]:
    source = random.Random(body["seed"])
    asked = body.get("response_format", {}).get("json_schema")
    text = json.dumps(_value(asked["schema"], source)) if asked else f"{_words(source, 60)}."
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 100, "completion_tokens": len(text) // 4}
    completion = {"id": "x", "object": "chat.completion", "model": MODEL, "choices": [choice], "usage": usage}
    return asked["name"] if asked else "", json.dumps(completion).encode()


def _value(schema: dict[str, Any], source: random.Random) -> Any:
    if schema["type"] == "object":
        return {name: _value(own, source) for name, own in schema["properties"].items()}
    if schema["type"] == "array":
        return [_value(schema["items"], source) for _ in range(schema["maxItems"])]
    return _words(source, 16 if schema["maxLength"] > 100 else 5)[: schema["maxLength"]]


def _words(source: random.Random, count: int) -> str:
    return " ".join(source.choices(WORDS.split(), k=count))
