"""Bodies are read up to a cap and taken as what they say: strict JSON, strict types, bounded counts; at once."""

import json
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tests.server.scripted import ScriptedEngine
from tests.server.test_app import HI, URL, check_error
from ultrafuser.server.settings import ServerSettings

# vLLM's own request model marks OpenAI's older spelling as deprecated and then reads it itself.
pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated:DeprecationWarning")

JSON = {"content-type": "application/json"}
TEXT: dict[str, Any] = {"prompt": "Hi"}
MAX_BYTES = 2**20
MOST_CPU_SECONDS = 3.0
"""Of this process, for a refusal; without a bound one of these takes minutes."""


@pytest.fixture
def settings() -> ServerSettings:
    """A smaller cap, so that it is soon reached."""
    return ServerSettings(max_body_bytes=MAX_BYTES)


NO_JSON = {
    "empty": b"",
    "truncated": json.dumps(HI).encode()[:-1],
    "array": b"[]",
    "null": b"null",
    "string": b'"x"',
    "UTF-16": json.dumps(HI).encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf" + json.dumps(HI).encode(),
    "not UTF-8": b'{"model": "\xff"}',
    "lone surrogate": b'{"model": "\\ud800"}',
    "not a number": json.dumps(HI | {"temperature": float("nan")}).encode(),
    "infinity": json.dumps(HI | {"temperature": float("inf")}).encode(),
    "equal keys": b'{"model": "tiny", "model": "other", "messages": []}',
    "equal keys below": b'{"messages": [{"role": "user", "role": "system", "content": "Hi"}]}',
    "deep arrays": b"[" * 10_000,
    "deep objects": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    "long number": b'{"seed": ' + b"9" * 5000 + b"}",
    "two values": b"{} {}",
    "strings without end": b"[" * 33_000 + b'\\"' * 200_000,
}


@pytest.mark.parametrize("body", NO_JSON.values(), ids=list(NO_JSON))
async def test_what_is_no_json_object_is_refused_without_much_work(client: httpx.AsyncClient, body: bytes) -> None:
    start = time.process_time()
    response = await client.post(URL, content=body, headers=JSON)
    assert time.process_time() - start < MOST_CPU_SECONDS
    check_error(response, 400, None, None)


@pytest.mark.parametrize("media_type", ["text/plain", "application/x-www-form-urlencoded", "application/jsonl", ""])
@pytest.mark.parametrize("url", [URL, "/v1/completions", "/v1/gate/analyze", "/tokenize", "/detokenize"])
async def test_a_body_must_be_declared_as_json(client: httpx.AsyncClient, url: str, media_type: str) -> None:
    headers = {"content-type": media_type} if media_type else {}
    response = await client.post(url, content=json.dumps(HI), headers=headers)
    check_error(response, 415, None, "unsupported_media_type")


async def test_parameters_of_the_media_type_do_not_matter(client: httpx.AsyncClient) -> None:
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert (await client.post(URL, content=json.dumps(HI), headers=headers)).status_code == 200


class Parts(httpx.AsyncByteStream):
    """A body of unknown length, sent in parts of 64 KiB; `sent` says how far its reader came."""

    def __init__(self, size: int) -> None:
        self.size, self.sent = size, 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while self.sent < self.size:
            self.sent += 2**16
            yield b" " * 2**16


async def test_reading_stops_at_the_cap(client: httpx.AsyncClient) -> None:
    parts = Parts(100 * MAX_BYTES)
    response = await client.post(URL, content=parts, headers=JSON)
    check_error(response, 413, None, "request_too_large")
    assert response.headers["connection"] == "close"
    assert parts.sent <= MAX_BYTES + 2 * 2**16


@pytest.mark.parametrize("length", [MAX_BYTES + 1, 10**30])
async def test_a_declared_length_over_the_cap_is_not_read_at_all(client: httpx.AsyncClient, length: int) -> None:
    parts = Parts(2**16)
    response = await client.post(URL, content=parts, headers=JSON | {"content-length": str(length)})
    check_error(response, 413, None, "request_too_large")


async def test_a_body_just_below_the_cap_is_read(client: httpx.AsyncClient) -> None:
    rest = MAX_BYTES - len(json.dumps(HI | {"user": ""}))
    body = json.dumps(HI | {"user": "u" * rest})
    assert len(body) == MAX_BYTES
    assert (await client.post(URL, content=body, headers=JSON)).status_code == 200


LAX: list[tuple[str, Any]] = [
    ("temperature", "0"),
    ("temperature", True),
    ("n", "1"),
    ("n", 1.0),
    ("n", True),
    ("max_tokens", "5"),
    ("max_tokens", 1.5),
    ("max_tokens", 1e30),
    ("max_tokens", True),
    ("seed", "a"),
    ("seed", 2**64),
    ("stream", "yes"),
    ("stream", 1),
    ("stream_options", "yes"),
    ("ignore_eos", "true"),
    ("top_p", [1]),
    ("presence_penalty", {}),
    ("stop_token_ids", ["5"]),
    ("logit_bias", {"5": "1"}),
]


@pytest.mark.parametrize("url", [URL, "/v1/completions"])
@pytest.mark.parametrize(("field", "value"), LAX, ids=str)
async def test_no_type_is_taken_for_another(
    client: httpx.AsyncClient, engine: ScriptedEngine, url: str, field: str, value: Any
) -> None:
    response = await client.post(url, json=(HI if url == URL else TEXT) | {field: value})
    error = check_error(response, 400, response.json()["error"]["param"], None)
    assert (error["param"] or "").partition(".")[0] == field
    assert engine.prompts == []


async def test_a_whole_number_is_a_number(client: httpx.AsyncClient) -> None:
    assert (await client.post(URL, json=HI | {"temperature": 0, "top_p": 1})).status_code == 200


BEYOND: list[tuple[str, Any]] = [
    ("n", 0),
    ("n", -1),
    ("n", 129),
    ("n", 10**9),
    ("n", 10**4000),
    ("max_tokens", -1),
    ("max_tokens", 2**31),
    ("max_tokens", 2**63),
    ("min_tokens", -1),
    ("temperature", -0.1),
    ("temperature", 2.1),
    ("temperature", 1e308),
    ("top_p", 0),
    ("top_p", 1.1),
    ("top_k", -2),
    ("top_k", 2**40),
    ("min_p", -0.1),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -2.1),
    ("repetition_penalty", 0),
    ("stop", ""),
    ("stop", [""]),
    ("stop", ["a", "b", "c", "d", "e"]),
    ("stop", "x" * 1001),
    ("stop", ["x"] * 100_000),
    ("logit_bias", {"x": 1}),
    ("logit_bias", {"-1": 1}),
    ("logit_bias", {"319.5": 1}),
    ("logit_bias", {"5": 101}),
    ("logit_bias", {"5": -101}),
    ("logit_bias", {str(key): 1 for key in range(2049)}),
    ("bad_words", [f"word {number}" for number in range(200)]),
    ("bad_words", [1] * 100_000),
    ("logprob_token_ids", [5] * 200),
    ("priority", 1),
    ("model", ""),
    ("stream_interval", 0),
]


@pytest.mark.parametrize("url", [URL, "/v1/completions"])
@pytest.mark.parametrize(("field", "value"), BEYOND, ids=lambda value: str(value)[:20])
async def test_no_number_or_list_goes_beyond_its_bounds(
    client: httpx.AsyncClient, engine: ScriptedEngine, url: str, field: str, value: Any
) -> None:
    extra = {"logprobs": True if url == URL else 1} if field == "logprob_token_ids" else {}
    content = _dumps((HI if url == URL else TEXT) | extra | {field: value})
    start = time.process_time()
    response = await client.post(url, content=content, headers=JSON)
    assert time.process_time() - start < MOST_CPU_SECONDS
    check_error(response, 400, field, None)


CHAT_BOUNDS: list[tuple[str | None, dict[str, Any]]] = [
    ("top_logprobs", {"logprobs": True, "top_logprobs": 21}),
    ("top_logprobs", {"logprobs": True, "top_logprobs": -1}),
    ("top_logprobs", {"top_logprobs": 3}),
    ("logprobs", {"logprobs": 1}),
    ("max_completion_tokens", {"max_completion_tokens": 0}),
    ("max_completion_tokens", {"max_completion_tokens": -5}),
    ("max_completion_tokens", {"max_completion_tokens": 2**31}),
    ("messages", {"messages": [{"role": "user", "content": "Hi"}] * 2049}),
    (None, {"messages": [{"role": "user", "content": [[[]] * 300] * 300}]}),
    ("messages", {"messages": [5] * 100_000}),
    ("messages.0", {"messages": [5] * 2000}),
    ("messages.0.tool_calls.0.id", {"messages": [{"role": "assistant", "tool_calls": [{"id": 5}] * 500}]}),
    ("messages.0.content", {"messages": [{"role": "user", "content": [5] * 2000}] * 15}),
    ("messages.0.name", {"messages": [{"role": "user", "content": "Hi", "name": 5}] * 2000}),
    ("vllm_xargs", {"vllm_xargs": {str(key): [True] * 100 for key in range(1000)}}),
    ("vllm_xargs", {"vllm_xargs": {"a": 2**64}}),
    ("stream_interval", {"stream_interval": 2**64}),
    ("bad_words", {"bad_words": ["a" * 5000]}),
    ("bad_words", {"bad_words": ["", "a"]}),
    ("tools", {"tools": [{"type": "function", "function": {"name": "f"}}] * 2049}),
    ("n", {"n": 2, "temperature": 0}),
]


@pytest.mark.parametrize(("param", "extra"), CHAT_BOUNDS, ids=lambda value: str(value)[:30])
async def test_a_conversation_has_its_bounds(
    client: httpx.AsyncClient, engine: ScriptedEngine, param: str | None, extra: dict[str, Any]
) -> None:
    start = time.process_time()
    check_error(await client.post(URL, json=HI | extra), 400, param, None)
    assert time.process_time() - start < MOST_CPU_SECONDS


COMPLETION_BOUNDS: list[tuple[str | None, dict[str, Any]]] = [
    ("logprobs", {"logprobs": 21}),
    ("logprobs", {"logprobs": True}),
    ("prompt", {"prompt": None}),
    ("prompt", {"prompt": ["Hi"] * 129}),
    ("prompt", {"prompt": ["Hi"] * 100_000}),
    (None, {"prompt": [[5]] * 100_000}),
    ("prompt", {"prompt": [True] * 100_000}),
    ("prompt", {"prompt": [-1] * 100_000}),
    ("n", {"prompt": ["Hi"] * 65, "n": 2}),
]


@pytest.mark.parametrize(("param", "extra"), COMPLETION_BOUNDS, ids=lambda value: str(value)[:30])
async def test_raw_prompts_have_their_bounds(
    client: httpx.AsyncClient, engine: ScriptedEngine, param: str | None, extra: dict[str, Any]
) -> None:
    check_error(await client.post("/v1/completions", json=TEXT | extra), 400, param, None)
    assert engine.prompts == []


async def test_token_ids_may_be_many(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/completions", json={"prompt": [5] * 100_000})
    check_error(response, 400, "prompt", "context_length_exceeded")
    response = await client.post("/detokenize", json={"tokens": [76] * 5000})
    assert response.json() == {"prompt": "H" * 5000}


async def test_a_clients_key_does_not_fill_the_error(client: httpx.AsyncClient) -> None:
    response = await client.post(URL, json=HI | {"logit_bias": {"k" * 100_000: "x"}})
    assert response.status_code == 400
    assert len(response.content) < 1500


async def test_very_many_headers_are_refused(client: httpx.AsyncClient) -> None:
    headers = {f"x-filler-{number}": "x" for number in range(1000)}
    response = await client.post(URL, json=HI, headers=headers)
    check_error(response, 431, None, "headers_too_large")


def _dumps(body: dict[str, Any]) -> str:
    """As json.dumps, for numbers of any length."""
    long = [(name, value) for name, value in body.items() if isinstance(value, int) and abs(value) > 10**100]
    text = json.dumps({name: value for name, value in body.items() if (name, value) not in long})
    for name, value in long:
        text = f'{text[:-1]}, "{name}": {value}}}'
    return text


@pytest.mark.parametrize("url", [URL, "/v1/completions"])
async def test_what_an_error_quotes_is_cut_before_it_is_searched(client: httpx.AsyncClient, url: str) -> None:
    model = " " * 200_000 + 'File "", line , in '
    body = (HI if url == URL else TEXT) | {"model": model}
    start = time.process_time()
    response = await client.post(url, json=body)
    assert time.process_time() - start < MOST_CPU_SECONDS
    check_error(response, 404, "model", "model_not_found")


async def test_a_text_that_cannot_fit_is_not_tokenized(client: httpx.AsyncClient) -> None:
    start = time.process_time()
    response = await client.post("/v1/gate/analyze", json={"text": "a " * (MAX_BYTES // 2 - 100)})
    assert time.process_time() - start < MOST_CPU_SECONDS
    check_error(response, 400, "text", "context_length_exceeded")
