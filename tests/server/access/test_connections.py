"""Real connections to a real uvicorn: clients that send or read too slowly are cut off, others are not."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import suppress

import httpx
import pytest
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from tests.server.listening import listening
from ultrafuser.server.access.connections import MAX_HEADER_BYTES, GuardedProtocol

LIMIT_SECONDS = 1.0
HUGE_BYTES = 64 << 20
SLOW_READERS = 20


class App:
    """/huge streams 64 MiB, /refused does not read, anything else echoes the body."""

    def __init__(self) -> None:
        self.num_streaming = 0
        self.num_left = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/refused":
            await PlainTextResponse("no", 413, {"Connection": "close"})(scope, receive, send)
            return
        if scope["path"] == "/huge":
            await StreamingResponse(self._chunks())(scope, receive, send)
            return
        try:
            body = await Request(scope, receive).body()
            await PlainTextResponse(body)(scope, receive, send)
        except ClientDisconnect:
            self.num_left += 1

    async def _chunks(self) -> AsyncIterator[bytes]:
        self.num_streaming += 1
        try:
            for _ in range(HUGE_BYTES >> 16):
                yield bytes(1 << 16)
        finally:
            self.num_streaming -= 1


@pytest.fixture
def app() -> App:
    return App()


@pytest.fixture
async def port(app: App) -> AsyncIterator[int]:
    """Where the app is served, with short limits."""
    async with listening(app, LIMIT_SECONDS) as port:
        yield port


async def is_cut_off(port: int, sent: bytes) -> float:
    """Send this and nothing more; the seconds until the server closes the connection without an answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    start = time.monotonic()
    writer.write(sent)
    with suppress(ConnectionResetError):
        assert await asyncio.wait_for(reader.read(), 10) == b""
    writer.close()
    return time.monotonic() - start


async def test_a_client_that_sends_half_a_request_is_cut_off(port: int, app: App) -> None:
    halves = [
        b"",
        b"POST / HT",
        b"POST / HTTP/1.1\r\nHost: x\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n",
    ]
    for seconds in await asyncio.gather(*(is_cut_off(port, half) for half in halves)):
        assert LIMIT_SECONDS * 0.9 < seconds < 5
    assert app.num_left == 2  # of those whose body was waited for


async def test_a_slow_drip_does_not_move_the_limit(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    start = time.monotonic()
    writer.write(b"GET / HTTP/1.1\r\nX: ")

    async def drip() -> None:
        while True:
            writer.write(b"y")
            await asyncio.sleep(0.02)

    dripping = asyncio.create_task(drip())
    with suppress(ConnectionResetError):
        assert await asyncio.wait_for(reader.read(), 10) == b""
    assert LIMIT_SECONDS * 0.9 < time.monotonic() - start < 5
    dripping.cancel()
    writer.close()


async def test_a_connection_may_be_used_for_longer_than_the_limit(port: int) -> None:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        for index in range(6):
            assert (await client.post("/", content=f"{index}")).text == str(index)
            await asyncio.sleep(LIMIT_SECONDS / 4)


async def test_a_request_behind_an_unanswered_one_is_not_read(port: int) -> None:
    """The answer comes whole, then the connection ends; a request whose body does not come holds no place."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /huge HTTP/1.1\r\nHost: x\r\n\r\nPOST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n")
    async with asyncio.timeout(60):
        head = await reader.readuntil(b"\r\n\r\n")
        rest = await reader.read()
    assert head.startswith(b"HTTP/1.1 200")
    assert len(rest) >= HUGE_BYTES
    assert b"HTTP/1.1" not in rest
    writer.close()


async def test_slow_readers_are_cut_off_and_hold_up_nobody(port: int, app: App) -> None:
    async def stop_reading() -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        writer.write(b"GET /huge HTTP/1.1\r\nHost: x\r\n\r\n")
        await writer.drain()
        readers.append(writer)

    readers: list[asyncio.StreamWriter] = []
    await asyncio.gather(*(stop_reading() for _ in range(SLOW_READERS)))
    async with asyncio.timeout(10):
        while app.num_streaming < SLOW_READERS:
            await asyncio.sleep(0.01)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        assert (await client.post("/", content="quick")).text == "quick"
        assert len((await client.get("/huge")).content) == HUGE_BYTES
    async with asyncio.timeout(10):
        while app.num_streaming:
            await asyncio.sleep(0.01)
    for writer in readers:
        writer.close()


@pytest.mark.parametrize("framing", ["Content-Length: 8388608", "Transfer-Encoding: chunked"])
async def test_a_client_that_is_refused_while_it_sends_gets_the_answer_then_the_end(port: int, framing: str) -> None:
    """The connection was reset under the rest of the body, and a proxy in between told its client nothing."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"POST /refused HTTP/1.1\r\nHost: x\r\n{framing}\r\n\r\n".encode())
    body = bytes(1 << 23)
    async with asyncio.timeout(LIMIT_SECONDS):  # not only at the end of the time that it may take
        await reader.readuntil(b"\r\n\r\n")  # before the body is there
        writer.write(b"800000\r\n%s\r\n0\r\n\r\n" % body if "chunked" in framing else body)
        await writer.drain()
        assert await reader.read() == b"no"
    writer.close()


async def test_a_client_that_is_refused_and_sends_no_more_is_cut_off(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ultrafuser.server.access.connections.LINGER_SECONDS", 0.1)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST /refused HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n12345")
    async with asyncio.timeout(LIMIT_SECONDS / 2):
        assert (await reader.read()).endswith(b"\r\n\r\nno")
    writer.close()


async def test_headers_without_end_are_refused(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * (MAX_HEADER_BYTES + 1))
    answer = await asyncio.wait_for(reader.read(), 5)
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    error = json.loads(body)["error"]
    assert error["type"] == "invalid_request_error"
    assert str(MAX_HEADER_BYTES) in error["message"]


async def test_what_is_no_http_gets_an_error_object(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"\x16\x03\x01\x02\x00\x01\r\n\r\n")
    answer = await asyncio.wait_for(reader.read(), 5)
    writer.close()
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert set(json.loads(answer.partition(b"\r\n\r\n")[2])) == {"error"}


async def test_a_large_body_is_no_long_header(port: int) -> None:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        body = "b" * (4 * MAX_HEADER_BYTES)
        assert (await client.post("/", content=body)).text == body


def test_the_protocol_is_the_one_that_uvicorn_would_choose() -> None:
    assert "httptools" in GuardedProtocol.__mro__[1].__module__
