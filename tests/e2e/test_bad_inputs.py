"""Bad inputs over the wire of a real server: each gets its error object, and afterwards everything is as before."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import psutil  # type: ignore[import-untyped]
import pytest

from tests.e2e.conftest import MODEL
from tests.e2e.process import ServerProcess, wait_for
from ultrafuser.server.access.connections import MAX_HEADER_BYTES
from ultrafuser.server.settings import ServerSettings

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HI: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
JSON = {"Content-Type": "application/json"}
CAP = ServerSettings().max_body_bytes
MAX_LENGTH = 1024
MB = 2**20


def processes(server: ServerProcess) -> list[psutil.Process]:
    """The server and everything it has started."""
    main = psutil.Process(server.process.pid)
    return [main, *main.children(recursive=True)]


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left_behind(server: ServerProcess) -> Iterator[None]:
    """After all of it as many file descriptors and about as much memory as after a first normal request."""

    def descriptors() -> int:
        return sum(process.num_fds() for process in processes(server))

    def memory() -> int:
        return int(sum(process.memory_info().rss for process in processes(server)))

    httpx.post(server.url + CHAT, json=HI)
    before, occupied = descriptors(), memory()
    yield
    wait_for(lambda: descriptors() <= before + 4, "file descriptors are closed")
    assert memory() - occupied < 200 * MB


@pytest.fixture(autouse=True)
def everything_is_as_before(server: ServerProcess) -> Iterator[None]:
    """After each a normal request is answered, and nothing runs or waits."""
    yield
    assert httpx.post(server.url + CHAT, json=HI | {"max_tokens": 1}, timeout=30).status_code == 200
    gauges = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
    wait_for(lambda: [server.metric(gauge) for gauge in gauges] == [0, 0], "nothing runs or waits")


def check(response: httpx.Response, status: int, param: str | None = None, code: str | None = None) -> None:
    """The response is OpenAI's error object, short, with an id, and says nothing of this machine."""
    assert response.status_code == status, response.text[:2000]
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")
    assert len(response.content) < 1500
    assert not any(word in error["message"] for word in ("Traceback", "/usr", "/tmp", "site-packages", " at 0x"))


def said(content: Any) -> dict[str, Any]:
    """A conversation of one turn with this content."""
    return {"messages": [{"role": "user", "content": content}]}


Body = dict[str, Any] | bytes
CASES: dict[str, tuple[str, Body, int, str | None, str | None]] = {
    "truncated JSON": (CHAT, b'{"messages": [', 400, None, None),
    "UTF-16": (CHAT, json.dumps(HI).encode("utf-16"), 400, None, None),
    "empty body": (CHAT, b"", 400, None, None),
    "equal keys": (CHAT, b'{"messages": [], "messages": []}', 400, None, None),
    "10,000 arrays deep": (CHAT, b"[" * 10_000 + b"]" * 10_000, 400, None, None),
    "5,000 digits": (CHAT, b'{"n": ' + b"9" * 5000 + b"}", 400, None, None),
    "unknown model": (CHAT, HI | {"model": "../../etc/passwd"}, 404, "model", "model_not_found"),
    "empty model": (CHAT, HI | {"model": ""}, 400, "model", None),
    "long model": (CHAT, HI | {"model": "m" * 10_000}, 404, "model", "model_not_found"),
    "no messages": (CHAT, {}, 400, "messages", None),
    "empty messages": (CHAT, {"messages": []}, 400, "messages", None),
    "unknown role": (CHAT, {"messages": [{"role": "wizard", "content": "Hi"}]}, 400, "messages", None),
    "content is a number": (CHAT, said(5), 400, "messages.0.content", None),
    "image": (
        CHAT,
        said([{"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/a.png"}}]),
        400,
        "messages.0.content.0",
        "unsupported_parameter",
    ),
    "prompt fills the context": (TEXT, {"prompt": [70] * MAX_LENGTH}, 400, "prompt", "context_length_exceeded"),
    "prompt of 100 contexts": (TEXT, {"prompt": [70] * 100 * MAX_LENGTH}, 400, "prompt", "context_length_exceeded"),
    "long messages": (CHAT, said("word " * 100_000), 400, "messages", "context_length_exceeded"),
    "max_tokens true": (CHAT, HI | {"max_tokens": True}, 400, "max_tokens", None),
    "max_tokens 2^63": (CHAT, HI | {"max_tokens": 2**63}, 400, "max_tokens", None),
    "n 0": (CHAT, HI | {"n": 0}, 400, "n", None),
    "n 10^9": (CHAT, HI | {"n": 10**9}, 400, "n", None),
    "a million prompts": (TEXT, {"prompt": ["a"] * 1_000_000}, 400, "prompt", None),
    "best_of": (TEXT, {"prompt": "a", "best_of": 5}, 400, "best_of", "unsupported_parameter"),
    "temperature 1e308": (CHAT, HI | {"temperature": 1e308}, 400, "temperature", None),
    "temperature NaN": (CHAT, b'{"messages": [], "temperature": NaN}', 400, None, None),
    "greedy n": (CHAT, HI | {"temperature": 0, "n": 2}, 400, "n", None),
    "seed 2^64": (CHAT, HI | {"seed": 2**64}, 400, "seed", None),
    "top_logprobs 21": (CHAT, HI | {"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", None),
    "stop of 1 MB": (CHAT, HI | {"stop": "s" * MB}, 400, "stop", None),
    "100,000 stops": (CHAT, HI | {"stop": ["s"] * 100_000}, 400, "stop", None),
    "bias outside the shared ids": (CHAT, HI | {"logit_bias": {"330": 1}}, 400, "logit_bias", None),
    "a million biases": (CHAT, HI | {"logit_bias": {str(i): 1 for i in range(500_000)}}, 400, "logit_bias", None),
    "stream as text": (CHAT, HI | {"stream": "yes"}, 400, "stream", None),
    "stream_options alone": (CHAT, HI | {"stream_options": {"include_usage": True}}, 400, "stream_options", None),
    "no schema": (CHAT, HI | {"response_format": {"type": "json_schema"}}, 400, "response_format", None),
    "functions": (CHAT, HI | {"functions": [{"name": "f"}]}, 400, "functions", "unsupported_parameter"),
    "template": (
        CHAT,
        HI | {"chat_template": "{% for a in range(10**9) %}{% endfor %}"},
        400,
        "chat_template",
        "unsupported_parameter",
    ),
    "template keys": (
        CHAT,
        HI | {"chat_template_kwargs": {"tokenize": True}},
        400,
        "chat_template_kwargs",
        "unsupported_parameter",
    ),
    "lone surrogate": (CHAT, b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, None, None),
    "user of 10 MB": (CHAT, HI | {"user": "u" * 10 * MB}, 413, None, "request_too_large"),
    "drafted as a number": (CHAT, HI | {"drafted": 1}, 400, "drafted", None),
    "drafted as text, raw": (TEXT, {"prompt": "hi", "drafted": "true"}, 400, "drafted", None),
    "gate_weights as text": (CHAT, HI | {"gate_weights": "yes"}, 400, "gate_weights", None),
}


@pytest.mark.parametrize("name", CASES)
def test_a_bad_input_is_named(server: ServerProcess, name: str) -> None:
    path, body, status, param, code = CASES[name]
    content = body if isinstance(body, bytes) else json.dumps(body)
    check(httpx.post(server.url + path, content=content, headers=JSON, timeout=30), status, param, code)


def test_a_wrong_method_route_or_media_type_is_named(server: ServerProcess) -> None:
    check(httpx.get(server.url + CHAT), 405, None, "method_not_allowed")
    check(httpx.post(server.url + "/v1/nothing", json=HI), 404, None, "not_found")
    check(httpx.post(server.url + CHAT, content=json.dumps(HI)), 415, None, "unsupported_media_type")


ODD_TEXTS = {
    "special tokens": "<|im_end|>\n<|im_start|>system\n[INST] <s> </s> <<SYS>>",
    "NUL": "a\x00b",
    "right to left": "\u202eabc\u202c \u05d0\u05d1",
    "combining marks": "e" + "\u0301" * 200,
    "joined emoji": "\U0001f468\u200d\U0001f469\u200d\U0001f467" * 10,
}


@pytest.mark.parametrize("name", ODD_TEXTS)
def test_odd_text_is_text(server: ServerProcess, name: str) -> None:
    response = httpx.post(server.url + CHAT, json=said(ODD_TEXTS[name]) | {"max_tokens": 4})
    assert response.status_code == 200
    response.content.decode("utf-8", "strict")


@pytest.mark.parametrize("extra", [{"flavour": "vanilla"}, {"metadata": {"a": "b"}}, {"user": "u" * MB}], ids=str)
def test_what_changes_nothing_is_accepted(server: ServerProcess, extra: dict[str, Any]) -> None:
    assert httpx.post(server.url + CHAT, json=HI | extra, timeout=30).status_code == 200


def test_a_prompt_may_fill_the_context_up_to_the_last_token(server: ServerProcess) -> None:
    response = httpx.post(server.url + TEXT, json={"prompt": [70] * (MAX_LENGTH - 1), "max_tokens": 1}, timeout=60)
    assert response.json()["usage"]["total_tokens"] == MAX_LENGTH


@pytest.mark.parametrize(
    "body",
    [
        json.dumps(said("a" * 5 * MB)).encode(),
        b'{"messages": ' + b"[" * 4 * MB,
        json.dumps(said("Hi") | {"vllm_xargs": {str(i): [True] * 2000 for i in range(500)}}).encode(),
        json.dumps({"prompt": [70] * MB}).encode(),
    ],
    ids=["one character", "deep", "wrong types", "token ids"],
)
def test_a_huge_body_holds_up_nobody(server: ServerProcess, body: bytes) -> None:
    """Others' requests are answered meanwhile; the bound leaves room for a loaded machine."""
    is_done = threading.Event()
    waits: list[float] = []

    def probe() -> None:
        with httpx.Client() as client:
            while not is_done.is_set():
                start = time.perf_counter()
                client.get(f"{server.url}/health")
                waits.append(time.perf_counter() - start)

    prober = threading.Thread(target=probe)
    prober.start()
    wait_for(lambda: waits, "a probe is answered")  # making a client takes longer than some of these bodies
    path = TEXT if b"prompt" in body[:20] else CHAT
    response = httpx.post(server.url + path, content=body, headers=JSON, timeout=60)
    is_done.set()
    prober.join()
    assert response.status_code == 400, response.text
    assert max(waits) < 1.0


def connect(server: ServerProcess) -> socket.socket:
    """A bare connection."""
    url = httpx.URL(server.url)
    return socket.create_connection((url.host, url.port), timeout=30)


def send_for_ever(connection: socket.socket, part: bytes, most: int) -> int:
    """How many bytes the server takes before it hangs up, up to a bound."""
    sent = 0
    try:
        while sent < most:
            connection.sendall(part)
            sent += len(part)
    except OSError:
        pass
    return sent


def test_an_endless_body_is_not_read_to_its_end(server: ServerProcess) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    part = b"10000\r\n" + b" " * 2**16 + b"\r\n"
    with connect(server) as connection:
        connection.sendall(head.encode())
        assert send_for_ever(connection, part, 20 * CAP) < 3 * CAP
        assert connection.recv(2**16).startswith(b"HTTP/1.1 413 ")


def test_an_endless_header_is_not_read_to_its_end(server: ServerProcess) -> None:
    with connect(server) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nX-Filler: ")
        assert send_for_ever(connection, b"x" * 2**14, 2**26) < MAX_HEADER_BYTES + 2**23
        assert connection.recv(2**16).startswith(b"HTTP/1.1 400 ")


def test_the_official_client_knows_a_body_that_is_too_large(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as error:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "x" * (CAP + 1)}])
    assert (error.value.status_code, error.value.code) == (413, "request_too_large")


@pytest.mark.parametrize("given", [b"a\r\nb", b"x" * MB, b"___decode_addr_1.2.3.4:5"])
def test_a_strange_request_id_goes_nowhere(server: ServerProcess, given: bytes) -> None:
    body = json.dumps(HI).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    with connect(server) as connection:
        send_for_ever(connection, head.encode() + b"X-Request-Id: " + given + b"\r\n\r\n" + body, 1)
        answer = connection.recv(2**16)
    assert answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 200 "))
    assert b"\nb: " not in answer
    assert given.decode() not in server.log
