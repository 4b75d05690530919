"""`null` is the same as leaving a field out: wherever the official client may write it, and for every field of ours."""

import copy
import re
from collections import Counter
from typing import Any

import httpx
import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_completion_create_params
from openai.types.responses.response_create_params import ResponseCreateParamsNonStreaming
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.serve.tokenize.protocol import DetokenizeRequest, TokenizeChatRequest, TokenizeCompletionRequest

from tests.server.openai_types import Path, nullable_places
from tests.server.scripted import ScriptedEngine
from tests.server.test_app import check_error
from ultrafuser.server.api.analyze import GateAnalysisRequest
from ultrafuser.server.requests.responses_request import ResponsesRequest

# vLLM's own request model marks OpenAI's older spelling as deprecated and then reads it itself.
pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated:DeprecationWarning")

CHAT, TEXT, ANALYZE = "/v1/chat/completions", "/v1/completions", "/v1/gate/analyze"
RESPONSES = "/v1/responses"
USER = {"role": "user", "content": "Hi"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
CLIENTS_TYPES = {
    CHAT: chat_completion_create_params.CompletionCreateParamsNonStreaming,
    TEXT: completion_create_params.CompletionCreateParamsNonStreaming,
}
NOT_SERVED = {"prompt"}
"""Required here although it may be null there: the specialists share no text that begins a document."""

OWN = r"(cmpl-|call_|chatcmpl-tool-|resp_|msg_)[\w-]+|\"(created|created_at|completed_at)\":\d+"
"""What differs in every answer."""

Outcome = tuple[int, Any, list[Any], list[Any]]


async def outcome(client: httpx.AsyncClient, engine: ScriptedEngine, url: str, body: dict[str, Any]) -> Outcome:
    """What a body comes to: the response, and what reached the engine."""
    engine.prompts.clear()
    engine.params.clear()
    response = await client.post(url, json=body)
    answer = re.sub(
        r"(cmpl-|call_|chatcmpl-tool-|resp_|msg_)[\w-]+|\"(created|created_at|completed_at)\":\d+", "", response.text
    )
    prompts = [{name: value for name, value in prompt.items() if name != "arrival_time"} for prompt in engine.prompts]
    return response.status_code, answer, prompts, list(engine.params)


def with_null(body: dict[str, Any], path: Path) -> dict[str, Any]:
    """A copy of the body with null at the end of the way."""
    body = copy.deepcopy(body)
    place: Any = body
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = None
    return body


def without(body: dict[str, Any], path: Path) -> dict[str, Any]:
    """A copy of the body without what is at the end of the way."""
    body = with_null(body, path)
    place: Any = body
    for step in path[:-1]:
        place = place[step]
    del place[path[-1]]
    return body


def served(body: dict[str, Any], path: Path) -> dict[str, Any]:
    """The client's smallest body, as one that can be answered here."""
    body = {**body, "model": "tiny"}
    if path[0] == "tools":
        body["tool_choice"] = "none"
    if path[0] == "response_format":
        body["response_format"]["json_schema"]["schema"] = {"type": "object"}
    return body


@pytest.mark.parametrize("url", [CHAT, TEXT])
async def test_the_official_clients_nulls_are_left_out(
    client: httpx.AsyncClient, engine: ScriptedEngine, url: str
) -> None:
    places = [
        (served(body, path), path)
        for body, path in nullable_places(CLIENTS_TYPES[url])
        if body.get("messages", [{}])[0].get("role") != "function"  # an unknown role here
    ]
    assert len(places) > 15
    assert {path[-1] for _, path in places} >= {"n", "seed", "stop", "logit_bias", "stream_options", "stream"}
    for body, path in places:
        status, *rest = await outcome(client, engine, url, with_null(body, path))
        assert (status, *rest) == await outcome(client, engine, url, without(body, path)), path
        assert status == (400 if path[0] in NOT_SERVED else 200), (path, rest)


async def test_the_official_clients_nulls_are_left_out_of_items_and_tools(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    """Of every kind that the client can send, refused ones, too; vLLM refuses some that its own client writes."""
    statuses = Counter[int]()
    for body, path in nullable_places(ResponseCreateParamsNonStreaming):
        body = {"input": "Hi", "tool_choice": "none", **body}
        status, *rest = await outcome(client, engine, RESPONSES, with_null(body, path))
        assert (status, *rest) == await outcome(client, engine, RESPONSES, without(body, path)), path
        statuses[status] += 1
    assert set(statuses) == {200, 400}
    assert statuses[200] > 60


OURS: list[tuple[str, dict[str, Any], type]] = [
    (CHAT, {"messages": [USER]}, ChatCompletionRequest),
    (CHAT, {"messages": [USER], "tools": [TOOL], "tool_choice": "none"}, ChatCompletionRequest),
    (TEXT, {"prompt": "Hi"}, CompletionRequest),
    (RESPONSES, {"input": "Hi"}, ResponsesRequest),
    ("/tokenize", {"messages": [USER]}, TokenizeChatRequest),
    ("/tokenize", {"prompt": "Hi"}, TokenizeCompletionRequest),
    ("/detokenize", {"tokens": [76]}, DetokenizeRequest),
    (ANALYZE, {"text": "Hello"}, GateAnalysisRequest),
    (ANALYZE, {"messages": [USER], "answer": "Yes"}, GateAnalysisRequest),
]


@pytest.mark.parametrize(("url", "body", "model"), OURS, ids=[url for url, _, _ in OURS])
async def test_every_field_of_every_route_may_be_null(
    client: httpx.AsyncClient, engine: ScriptedEngine, url: str, body: dict[str, Any], model: Any
) -> None:
    """`min_tokens`, `tool_choice` and others had opinions of their own."""
    wanted = await outcome(client, engine, url, body)
    assert wanted[0] == 200
    names = {*model.model_fields, "gate_weights", "drafted", "functions", "guided_json", "invented"} - body.keys()
    assert await outcome(client, engine, url, body | dict.fromkeys(names)) == wanted


REQUIRED: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {"messages": None}, "messages"),
    (CHAT, {"messages": [None]}, "messages.0"),
    (CHAT, {"messages": [{"role": None, "content": "Hi"}]}, "messages.0.role"),
    *((CHAT, {"messages": [{"role": role, "content": None}]}, "messages.0.content") for role in ("user", "system")),
    (CHAT, {"messages": [{"role": "developer", "content": None}]}, "messages.0.content"),
    (CHAT, {"messages": [USER, {"role": "tool", "tool_call_id": "1", "content": None}]}, "messages.1.content"),
    (CHAT, {"messages": [{"role": "user", "content": [None]}]}, "messages.0.content"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]}, "messages.0.content.0.text"),
    (CHAT, {"messages": [USER], "tools": [None]}, "tools.0"),
    (CHAT, {"messages": [USER], "stop": [None]}, "stop"),
    (CHAT, {"messages": [USER], "logit_bias": {"76": None}}, "logit_bias.76"),
    (TEXT, {"prompt": None}, "prompt"),
    (RESPONSES, {"input": None}, "input"),
    (RESPONSES, {"input": [None]}, "input.0"),
    (RESPONSES, {"input": [{"role": "user", "content": None}]}, "input.0.content"),
    (RESPONSES, {"input": "Hi", "tools": [None]}, "tools.0.type"),
    (TEXT, {"prompt": [None]}, "prompt.0"),
    ("/tokenize", {"prompt": None}, "prompt"),
    ("/detokenize", {"tokens": None}, "tokens"),
    (ANALYZE, {"text": None}, "text"),
    (ANALYZE, {"messages": [USER], "answer": None}, "answer"),
]


async def test_null_is_not_what_has_to_be_there(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    for url, body, param in REQUIRED:
        error = check_error(await client.post(url, json=body), 400, param, None)
        assert "\n" not in error["message"], error
    assert engine.prompts == []


FURTHER_DOWN: list[tuple[dict[str, Any], Path]] = [
    ({"stream": True, "stream_options": {}}, ("stream_options", "include_usage")),
    ({"stream": True, "stream_options": {}}, ("stream_options", "continuous_usage_stats")),
    ({"tools": [TOOL], "tool_choice": "none"}, ("tools", 0, "function", "description")),
    (
        {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none"},
        ("tools", 0, "function", "parameters"),
    ),
    ({"response_format": {"type": "text"}}, ("response_format", "json_schema")),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {}}}},
        ("response_format", "json_schema", "description"),
    ),
    ({"structured_outputs": {"choice": ["a", "b"]}}, ("structured_outputs", "json")),
    ({"messages": [USER | {"name": "Ann"}]}, ("messages", 0, "name")),
    ({"messages": [{"role": "assistant", "content": "Hi"}, USER]}, ("messages", 0, "tool_calls")),
    ({"messages": [{"role": "assistant", "content": "Hi"}, USER]}, ("messages", 0, "annotations")),
    ({"messages": [{"role": "assistant", "content": "Hi"}, USER]}, ("messages", 0, "reasoning_content")),
]


async def test_what_others_write_as_null_within_a_field_is_left_out(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    for fields, path in FURTHER_DOWN:
        body = {"messages": [USER]} | fields
        found = await outcome(client, engine, CHAT, with_null(body, path))
        assert found == await outcome(client, engine, CHAT, without(body, path)), path
        assert found[0] == 200, found


async def test_a_null_within_a_schema_stays(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    schema = {"enum": [None, "a"], "default": None}
    shape = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    assert (await client.post(CHAT, json={"messages": [USER], "response_format": shape})).status_code == 200
    assert engine.params[0].structured_outputs.json == schema
