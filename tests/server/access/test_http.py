"""HTTP as clients in the field speak it, sent as bytes to the real application: offers of other protocols, HTTP/1.0,
HEAD, and heads and bodies that two readers could take for different requests."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.server.api.test_routes import BODIES
from tests.server.listening import listening, say
from tests.server.scripted import SCRIPT, ScriptedEngine
from ultrafuser.gating.model.fusion import FusedModelInfo, FusionConfig
from ultrafuser.server.access.connections import MAX_HEADER_BYTES
from ultrafuser.server.api.playground import FILES
from ultrafuser.server.app import create_app
from ultrafuser.server.health import Readiness
from ultrafuser.server.serving.serving import build_serving
from ultrafuser.server.settings import ServerSettings

# vLLM's own request model marks OpenAI's older spelling as deprecated and then reads it itself.
pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated:DeprecationWarning")

LIMIT_SECONDS = 1.0
CHAT = "/v1/chat/completions"
JSON = "Content-Type: application/json"
HI: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
READ_PATHS = ["/health", "/ready", "/version", "/v1/models", "/v1/models/tiny", "/openapi.json", *FILES]
OFFERS = {
    "Java": "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\n",
    "websocket": "Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n",
    "several": "Connection: upgrade\r\nUpgrade: TLS/1.3\r\nUpgrade: unheard-of/7, h2c\r\n",
    "not connected": "Upgrade: h2c\r\n",
}
each_offer = pytest.mark.parametrize("offer", OFFERS.values(), ids=OFFERS)


@pytest.fixture
def settings() -> ServerSettings:
    """A short body is long enough."""
    return ServerSettings(max_body_bytes=4096)


@pytest.fixture
async def port(
    engine: ScriptedEngine, fusion: FusionConfig, info: FusedModelInfo, settings: ServerSettings, readiness: Readiness
) -> AsyncIterator[int]:
    """Where the application is served."""
    app = create_app(build_serving(engine, fusion, info, settings), settings, readiness)
    async with listening(app, LIMIT_SECONDS) as port:
        yield port


def head(line: str, *headers: str) -> bytes:
    """A request's first line and headers."""
    return "\r\n".join([line, *(header.strip() for header in headers), "", ""]).encode()


def post(path: str, body: bytes, *headers: str, version: str = "1.1") -> bytes:
    """A whole request with a JSON body."""
    own = ["Host: x", JSON, f"Content-Length: {len(body)}"]
    return head(f"POST {path} HTTP/{version}", *own, *headers) + body


def split(answer: bytes) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and the rest of an answer."""
    top, _, rest = answer.partition(b"\r\n\r\n")
    line, *lines = top.decode().split("\r\n")
    assert line.startswith("HTTP/1.1 "), answer
    headers = dict(header.split(": ", 1) for header in lines)
    assert len(headers) == len(lines), "a header came twice"
    return int(line.split()[1]), headers, rest


def check_error(answer: bytes, status: int, code: str | None) -> None:
    """One answer, an error object, and the end of the connection."""
    found, headers, rest = split(answer)
    assert (found, headers["connection"]) == (status, "close")
    assert len(rest) == int(headers["content-length"])
    assert json.loads(rest)["error"]["code"] == code


def chunked(body: bytes) -> bytes:
    """A body in chunks of 10 bytes."""
    parts = [body[start : start + 10] for start in range(0, len(body), 10)]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in [*parts, b""])


@pytest.mark.parametrize("path", BODIES)
async def test_an_offer_of_another_protocol_is_passed_over_on_every_route(port: int, path: str) -> None:
    for own in BODIES[path]:
        body = json.dumps(own).encode()
        plain = post(path, body)
        offering = post(path, body, OFFERS["Java"])
        answers = [
            split(await answer_of(port, *parts)) for parts in ((plain,), (offering,), (offering[: -len(body)], body))
        ]
        assert [status for status, _, _ in answers] == [200] * 3
        assert len({tuple(json.loads(rest)) for _, _, rest in answers}) == 1


@each_offer
async def test_a_body_beside_an_offer_is_read_however_it_comes(port: int, offer: str) -> None:
    """It was taken for the other protocol's, and lost: the error said that it is not JSON."""
    body = json.dumps(HI).encode()
    whole = post(CHAT, body, offer)
    start = head(f"POST {CHAT} HTTP/1.1", "Host: x", JSON, "Transfer-Encoding: chunked", offer)
    ways = [
        (whole,),
        (whole[: -len(body)], body),
        (whole[:20], whole[20:-5], whole[-5:]),
        (start + chunked(body),),
        (start, chunked(body)[:8], chunked(body)[8:]),
    ]
    for parts in ways:
        status, headers, rest = split(await answer_of(port, *parts))
        assert status == 200, rest
        assert "upgrade" not in headers
        assert json.loads(rest)["choices"][0]["message"]["content"] == SCRIPT


async def answer_of(port: int, *parts: bytes) -> bytes:
    """The one answer with a length to a request on a connection that stays open."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        async with asyncio.timeout(20):
            for part in parts:
                writer.write(part)
                await asyncio.sleep(0.02)
            return await read_answer(reader)
    finally:
        writer.close()


async def read_answer(reader: asyncio.StreamReader) -> bytes:
    """One answer with a length."""
    top = await reader.readuntil(b"\r\n\r\n")
    return top + await reader.readexactly(int(split(top)[1]["content-length"]))


@each_offer
async def test_a_stream_is_answered_in_http_1_1_and_the_connection_goes_on(port: int, offer: str) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    async with asyncio.timeout(20):
        for _ in range(3):
            writer.write(post(CHAT, json.dumps({**HI, "stream": True}).encode(), offer))
            top = await reader.readuntil(b"\r\n\r\n")
            assert split(top)[1]["transfer-encoding"] == "chunked"
            assert b"data: [DONE]" in await reader.readuntil(b"0\r\n\r\n")
            writer.write(head("GET /health HTTP/1.1", "Host: x", offer))
            assert split(await read_answer(reader))[0] == 200
    writer.close()


@each_offer
async def test_limits_hold_for_a_request_that_offers_another_protocol(port: int, offer: str) -> None:
    long = head(f"POST {CHAT} HTTP/1.1", "Host: x", JSON, "Content-Length: 5000", offer)
    check_error(await say(port, long + b" " * 5000), 413, "request_too_large")
    endless = f"GET /health HTTP/1.1\r\nHost: x\r\n{offer}X: ".encode() + b"y" * (MAX_HEADER_BYTES + 1)
    check_error(await say(port, endless), 400, None)
    check_error(await say(port, head("GET /health HTTP/1.1", offer)), 400, "invalid_host")
    unfinished = post(CHAT, json.dumps(HI).encode(), offer)[:-1]
    assert await say(port, unfinished) == b""  # cut off, as without the offer


async def test_a_request_behind_an_offer_is_not_read(port: int) -> None:
    """As behind any request that is not answered yet: the answer comes, then the connection ends."""
    first = post(CHAT, json.dumps(HI).encode(), OFFERS["Java"])
    answer = await say(port, first + head("GET /health HTTP/1.1", "Host: x"))
    status, headers, rest = split(answer)
    assert (status, len(rest)) == (200, int(headers["content-length"]))


@pytest.mark.parametrize(
    "line", ["CONNECT example.org:443 HTTP/1.1", "CONNECT /health HTTP/1.1", "PRI * HTTP/2.0"], ids=str
)
async def test_neither_a_proxy_nor_http_2_is_to_be_had(port: int, line: str) -> None:
    check_error(await say(port, head(line, "Host: x")), 400, None)


@pytest.mark.parametrize("keep", ["", "Connection: keep-alive", "Connection: close"], ids=str)
async def test_a_stream_for_http_1_0_is_plain_and_ends_with_the_connection(port: int, keep: str) -> None:
    """Chunks were sent, whose lengths such a client takes for a part of the events."""
    own = [keep] if keep else []
    body = json.dumps({**HI, "stream": True}).encode()
    status, headers, rest = split(await say(port, post(CHAT, body, *own, version="1.0")))
    assert (status, headers["connection"]) == (200, "close")
    assert headers["content-type"].startswith("text/event-stream")
    assert not {"transfer-encoding", "content-length"} & headers.keys()
    *events, done, end = rest.decode().split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    deltas = [json.loads(event.removeprefix("data: "))["choices"][0]["delta"] for event in events]
    assert "".join(delta.get("content", "") for delta in deltas) == SCRIPT


async def test_a_stream_for_http_1_0_may_end_in_an_error(port: int, engine: ScriptedEngine) -> None:
    engine.failure, engine.fails_at = RuntimeError("broken"), 2
    body = json.dumps({**HI, "stream": True}).encode()
    _, _, rest = split(await say(port, post(CHAT, body, version="1.0")))
    *_, error, done, _ = rest.decode().split("\n\n")
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "internal_error"
    assert done == "data: [DONE]"


@pytest.mark.parametrize("expect", ["X-Nothing: 1", "Expect: 100-continue"], ids=str)
@pytest.mark.parametrize(("own", "status"), [(HI, 200), ({"messages": 5}, 400)], ids=["answer", "error"])
async def test_whole_answers_for_http_1_0_have_a_length_and_no_interim_answer(
    port: int, own: dict[str, Any], status: int, expect: str
) -> None:
    request = post(CHAT, json.dumps(own).encode(), "Connection: keep-alive", expect, version="1.0")
    found, headers, rest = split(await say(port, request))
    assert (found, headers["connection"]) == (status, "close")
    assert len(rest) == int(headers["content-length"])


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("path", READ_PATHS)
async def test_head_is_answered_as_get_without_the_body(port: int, path: str, version: str) -> None:
    answers = []
    for method in ("GET", "HEAD"):
        answer = await say(port, head(f"{method} {path} HTTP/{version}", "Host: x", "Connection: close"))
        answers.append(split(answer))
    (_, _, body), (_, _, nothing) = answers
    assert nothing == b""
    assert int(answers[0][1]["content-length"]) == len(body) > 0
    for _, headers, _ in answers:
        del headers["date"], headers["x-request-id"]
    assert answers[0][:2] == answers[1][:2]


async def test_head_of_metrics_has_no_body_and_head_of_a_post_route_no_get(port: int) -> None:
    """Metrics change while they are read: their length is not compared."""
    status, headers, rest = split(await say(port, head("HEAD /metrics HTTP/1.1", "Host: x", "Connection: close")))
    assert (status, rest) == (200, b"")
    assert headers["content-type"].startswith("text/plain; version=")
    status, headers, rest = split(await say(port, head(f"HEAD {CHAT} HTTP/1.1", "Host: x", "Connection: close")))
    assert (status, headers["allow"], rest) == (405, "POST", b"")
    for path in ("/v1/models", "/"):
        answer = await say(port, post(path, b"{}", "Connection: close"))
        assert (split(answer)[0], split(answer)[1]["allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize(
    ("version", "hosts", "is_taken"),
    [
        ("1.1", [], False),
        ("1.0", [], True),
        ("1.1", ["x", "x"], False),
        ("1.1", ["x", "y"], False),
        ("1.0", ["x", "y"], False),
        ("1.1", [""], True),
        ("1.1", ["my_host-1.example:8000"], True),
        ("1.1", ["[::1]:8000"], True),
        ("1.1", ["127.0.0.1:"], True),
        ("1.1", ["a b"], False),
        ("1.1", ["a, b "], False),
        ("1.1", ["user@x"], False),
        ("1.1", ["x/path"], False),
        ("1.1", ["x:80:80"], False),
        ("1.1", ["x:http"], False),
        ("1.1", ["[::1"], False),
        ("1.1", ["h\xf6st"], False),
        ("1.0", ["a b"], False),
    ],
)
@pytest.mark.parametrize("line", ["GET /health", "POST /v1/chat/completions"], ids=str)
async def test_http_1_1_says_once_which_host_is_asked(
    port: int, line: str, version: str, hosts: list[str], is_taken: bool
) -> None:
    body = json.dumps(HI).encode() if line.startswith("POST") else b""
    own = ["Connection: close", JSON, f"Content-Length: {len(body)}"]
    answer = await say(port, head(f"{line} HTTP/{version}", *own, *(f"Host: {host}" for host in hosts)) + body)
    if is_taken:
        assert split(answer)[0] == 200
    else:
        check_error(answer, 400, "invalid_host")


@pytest.mark.parametrize(
    "framing",
    [
        "Content-Length: 2\r\nContent-Length: 2",
        "Content-Length: 2\r\nContent-Length: 3",
        "Content-Length: 2, 2",
        "Content-Length: +2",
        "Content-Length: 2\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nContent-Length: 2",
        "Transfer-Encoding: gzip",
        "Transfer-Encoding: xchunked",
        "Transfer-Encoding: chunked, identity",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
        "Transfer-Encoding : chunked",
    ],
    ids=str,
)
async def test_a_body_of_two_lengths_is_refused_at_once(port: int, framing: str) -> None:
    """Where the length was wrong by its own header's value, nothing was said until the time to send it was over."""
    request = head(f"POST {CHAT} HTTP/1.1", "Host: x", JSON, framing)
    check_error(await say(port, request + b"{}"), 400, None)


@pytest.mark.parametrize("chunk", ["2x\r\n{}\r\n0\r\n\r\n", "-2\r\n", "2\r\n{}xx0\r\n\r\n", "2\n{}\n0\n\n"], ids=repr)
async def test_a_body_in_broken_chunks_ends_the_request_with_an_error(
    port: int, chunk: str, engine: ScriptedEngine
) -> None:
    request = head(f"POST {CHAT} HTTP/1.1", "Host: x", JSON, "Transfer-Encoding: chunked")
    for parts in ((request + chunk.encode(),), (request, chunk.encode())):
        check_error(await say(port, *parts), 400, None)
    assert engine.prompts == []


async def test_a_header_behind_the_body_changes_nothing(port: int) -> None:
    """It was added to the request's own: a second host, another key."""
    body = json.dumps(HI).encode()
    request = head(f"POST {CHAT} HTTP/1.1", "Host: x", JSON, "Transfer-Encoding: chunked")
    trailers = b"Host: y\r\nContent-Type: text/plain\r\nX-Request-Id: from-behind\r\n"
    sent = request + chunked(body).removesuffix(b"\r\n") + trailers + b"\r\n"
    status, headers, _ = split(await answer_of(port, sent))
    assert status == 200
    assert headers["x-request-id"] != "from-behind"


@pytest.mark.parametrize(
    "endless", [b"0\r\nX: ", b"5;extension="], ids=["headers behind a body", "a chunk's extension"]
)
async def test_what_never_ends_behind_a_head_is_refused(port: int, endless: bytes) -> None:
    """The parser keeps it, and copies all of it for each part that comes; no key and no body's limit stood before."""
    request = head(f"POST {CHAT} HTTP/1.1", "Host: x", JSON, "Transfer-Encoding: chunked")
    parts = [b"a" * 16384] * (MAX_HEADER_BYTES // 16384 + 2)
    status, _, body = split(await say(port, request + endless, *parts))
    assert (status, json.loads(body)["error"]["message"]) == (400, "The headers are longer than 65536 bytes.")
