"""What does not fit into the context beside its prompt is cut to what fits; a prompt that leaves no room is refused."""

from itertools import product
from typing import Any

import httpx
import pytest

from tests.fakes import MAX_POSITIONS
from tests.server.scripted import ScriptedEngine
from tests.server.test_app import check_error

# vLLM's own request model marks OpenAI's older spelling as deprecated and then reads it itself.
pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated:DeprecationWarning")

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI: dict[str, dict[str, Any]] = {CHAT: {"messages": [{"role": "user", "content": "Hi"}]}, TEXT: {"prompt": "Hi"}}
LONG: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "q" * 800}]},
    TEXT: {"prompt": [70] * (MAX_POSITIONS - 24)},
}
FAR_TOO_MANY = (MAX_POSITIONS, MAX_POSITIONS + 1, 32_000, 2**31 - 1)


def rooms(engine: ScriptedEngine) -> list[int]:
    """What each prompt that reached the engine leaves: the longest of the n renderings decides."""
    lengths = [len(prompt["prompt_token_ids"]) for prompt in engine.prompts]
    for prompt, length in zip(engine.prompts, lengths, strict=True):
        assert length == max(map(len, prompt.get("specialist_prompts", [range(length)])))
    return [MAX_POSITIONS - length for length in lengths]


@pytest.mark.parametrize(
    ("url", "field"), [(CHAT, "max_tokens"), (CHAT, "max_completion_tokens"), (TEXT, "max_tokens")]
)
async def test_too_large_a_response_is_cut_to_what_fits(
    client: httpx.AsyncClient, engine: ScriptedEngine, url: str, field: str
) -> None:
    """More than the whole context was refused; agents send it always."""
    for number, body, stream in product(FAR_TOO_MANY, (HI, LONG), (False, True)):
        response = await client.post(url, json=body[url] | {field: number, "stream": stream})
        assert response.status_code == 200, response.text
    assert [params.max_tokens for params in engine.params] == rooms(engine)
    assert len(engine.params) == 4 * len(FAR_TOO_MANY)


@pytest.mark.parametrize("url", [CHAT, TEXT])
async def test_what_fits_is_not_cut(client: httpx.AsyncClient, engine: ScriptedEngine, url: str) -> None:
    assert (await client.post(url, json=LONG[url] | {"max_tokens": 10, "min_tokens": 10})).status_code == 200
    assert [(params.max_tokens, params.min_tokens) for params in engine.params] == [(10, 10)]


async def test_the_newer_name_decides_when_both_are_sent(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    await client.post(CHAT, json=HI[CHAT] | {"max_tokens": 32_000, "max_completion_tokens": 7})
    await client.post(CHAT, json=HI[CHAT] | {"max_tokens": 7, "max_completion_tokens": 32_000})
    assert [params.max_tokens for params in engine.params] == [7, rooms(engine)[1]]


async def test_each_prompt_of_several_has_its_own_room(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    prompts = [[70] * 10, [70] * (MAX_POSITIONS - 1), [70] * 500]
    response = await client.post(TEXT, json={"prompt": prompts, "max_tokens": 32_000})
    assert response.status_code == 200, response.text
    assert [params.max_tokens for params in engine.params] == rooms(engine) == [MAX_POSITIONS - 10, 1, 524]


@pytest.mark.parametrize("url", [CHAT, TEXT])
@pytest.mark.parametrize(
    "numbers", [{"min_tokens": 600, "max_tokens": 600}, {"min_tokens": 32_000, "max_tokens": 32_000}]
)
async def test_at_least_so_many_tokens_are_cut_too(
    client: httpx.AsyncClient, engine: ScriptedEngine, url: str, numbers: dict[str, int]
) -> None:
    """vLLM held it against a `max_tokens` that it had cut itself."""
    assert (await client.post(url, json=LONG[url] | numbers)).status_code == 200
    assert [(params.min_tokens, params.max_tokens) for params in engine.params] == [(rooms(engine)[0],) * 2]


async def test_a_chat_without_a_limit_may_ask_for_a_least_number(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    assert (await client.post(CHAT, json=LONG[CHAT] | {"min_tokens": 5000})).status_code == 200
    assert engine.params[0].min_tokens == rooms(engine)[0]


@pytest.mark.parametrize("number", [5, 32_000])
@pytest.mark.parametrize("url", [CHAT, TEXT])
async def test_a_least_number_above_the_largest_is_refused(
    client: httpx.AsyncClient, engine: ScriptedEngine, url: str, number: int
) -> None:
    body = LONG[url] | {"min_tokens": number + 1, "max_tokens": number}
    error = check_error(await client.post(url, json=body), 400, "min_tokens", None)
    assert str(number) in error["message"]
    assert str(number + 1) in error["message"]
    assert engine.prompts == []


async def test_completions_without_a_limit_have_16_tokens(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    for more in ({}, {"max_tokens": None}):
        await client.post(TEXT, json={"prompt": [70] * 10} | more)
    await client.post(TEXT, json={"prompt": [70] * (MAX_POSITIONS - 5)})
    assert [params.max_tokens for params in engine.params] == [16, 16, 5]


async def test_a_prompt_is_truncated_to_what_leaves_room_for_a_token(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    kept = (-1, MAX_POSITIONS - 1, MAX_POSITIONS, 32_000)
    for number, more in product(kept, ({"max_tokens": 5}, {"max_tokens": 0, "echo": True})):
        body = {"prompt": [70] * 2000, "truncate_prompt_tokens": number, **more}
        response = await client.post(TEXT, json=body)
        assert response.status_code == 200, response.text
    assert [params.max_tokens for params in engine.params] == rooms(engine) == [1] * 8


@pytest.mark.parametrize("length", [MAX_POSITIONS, MAX_POSITIONS + 1, 5000])
async def test_a_prompt_without_room_is_refused_with_its_numbers(
    client: httpx.AsyncClient, engine: ScriptedEngine, length: int
) -> None:
    wishes: list[dict[str, Any]] = [{}, {"max_tokens": 1}, {"max_tokens": 32_000}, {"max_tokens": 0, "echo": True}]
    for more, stream in product(wishes, (False, True)):
        body = {"prompt": [70] * length, "stream": stream, **more}
        error = check_error(await client.post(TEXT, json=body), 400, "prompt", "context_length_exceeded")
        assert f"{MAX_POSITIONS} tokens" in error["message"]
        assert f"{length} tokens" in error["message"]
    assert engine.prompts == []


@pytest.mark.parametrize("more", [{}, {"max_tokens": 1}, {"max_completion_tokens": 32_000}], ids=str)
async def test_a_conversation_without_room_is_refused_with_its_numbers(
    client: httpx.AsyncClient, engine: ScriptedEngine, more: dict[str, Any]
) -> None:
    conversation = {"messages": [{"role": "user", "content": "q" * 1000}]}
    length = (await client.post("/tokenize", json=conversation)).json()["count"]
    assert length > MAX_POSITIONS
    response = await client.post(CHAT, json=conversation | more)
    error = check_error(response, 400, "messages", "context_length_exceeded")
    assert f"{MAX_POSITIONS} tokens" in error["message"]
    assert f"{length} tokens" in error["message"]
    assert engine.prompts == []


async def test_the_prompt_of_several_that_is_too_long_is_numbered(client: httpx.AsyncClient) -> None:
    body = {"prompt": [[70] * 10, [70] * MAX_POSITIONS]}
    error = check_error(await client.post(TEXT, json=body), 400, "prompt", "context_length_exceeded")
    assert "number 2 of 2 prompts" in error["message"]


@pytest.mark.parametrize(
    ("body", "param", "lengths"),
    [
        ({"text": "q" * MAX_POSITIONS}, None, ()),
        ({"text": "q" * (MAX_POSITIONS + 1)}, "text", (MAX_POSITIONS + 1,)),
        ({"messages": HI[CHAT]["messages"], "answer": "q" * (MAX_POSITIONS + 1)}, "answer", (MAX_POSITIONS + 1,)),
        ({"messages": LONG[CHAT]["messages"], "answer": "q" * 500}, "answer", (500, 912)),
        ({"messages": [{"role": "user", "content": "q" * 1000}], "answer": "q"}, "messages", (1112,)),
    ],
    ids=["fits", "text", "answer", "answer beside its prompt", "messages"],
)
async def test_a_text_that_is_analyzed_is_not_cut_but_refused(
    client: httpx.AsyncClient, engine: ScriptedEngine, body: dict[str, Any], param: str | None, lengths: tuple[int, ...]
) -> None:
    response = await client.post("/v1/gate/analyze", json=body)
    if param is None:
        assert response.status_code == 200, response.text
        return
    error = check_error(response, 400, param, "context_length_exceeded")
    assert all(str(number) in error["message"] for number in (MAX_POSITIONS, *lengths)), error["message"]
