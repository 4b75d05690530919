"""Fields of a request for a response do what a chat completion's do, and errors name them as they were written."""

from typing import Any

import httpx
import pytest

from tests.server.scripted import ScriptedEngine
from tests.server.serving.responses.conftest import Asking
from ultrafuser.server.requests.responses_request import SAMPLING_FIELDS

# vLLM's own request model marks OpenAI's older spelling as deprecated and then reads it itself.
pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated:DeprecationWarning")

VALUES: dict[str, Any] = {
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "frequency_penalty": 0.5,
    "presence_penalty": 0.5,
    "repetition_penalty": 1.5,
    "seed": 7,
    "min_tokens": 2,
    "stop": ["is"],
    "stop_token_ids": [76],
    "include_stop_str_in_output": True,
    "ignore_eos": True,
    "logit_bias": {"76": 5.0},
    "allowed_token_ids": [76, 77],
    "bad_words": ["no"],
    "skip_special_tokens": False,
    "structured_outputs": {"choice": ["a", "b"]},
    "chat_template_kwargs": {"enable_thinking": False},
    "cache_salt": "salt",
    "priority": 0,
    "repetition_detection": {"max_pattern_size": 3, "min_count": 4},
    "vllm_xargs": {"my_key": "x"},
    "session_id": "s",
    "parallel_tool_calls": False,
}
NAMED = {"name": "n", "strict": True}
SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False}


def test_every_field_that_is_the_chats_has_a_value() -> None:
    assert {*VALUES} == {*SAMPLING_FIELDS}


async def both(
    client: httpx.AsyncClient, engine: ScriptedEngine, ours: dict[str, Any], chats: dict[str, Any]
) -> tuple[Any, Any]:
    """What reaches the engine by each route: parameters, prompts and salts."""
    engine.params.clear()
    engine.prompts.clear()
    chat = {"messages": [{"role": "user", "content": "Hi"}], "stream": True, **chats}
    for path, body in (("responses", {"input": "Hi", "stream": True, **ours}), ("chat/completions", chat)):
        response = await client.post(f"/v1/{path}", json=body)
        assert response.status_code == 200, response.text
    told = [{key: value for key, value in prompt.items() if key != "arrival_time"} for prompt in engine.prompts]
    one, other = zip(map(repr, engine.params), told, strict=True)
    return one, other


@pytest.mark.parametrize("name", VALUES)
async def test_a_field_reaches_the_engine_as_the_chats_does(
    client: httpx.AsyncClient, engine: ScriptedEngine, name: str
) -> None:
    field = {name: VALUES[name]}
    ours, chats = await both(client, engine, field, field)
    assert ours == chats


@pytest.mark.parametrize(
    ("ours", "chats"),
    [
        ({"max_output_tokens": 3}, {"max_completion_tokens": 3}),
        ({"top_logprobs": 2}, {"logprobs": True, "top_logprobs": 2}),
        ({"include": ["message.output_text.logprobs"]}, {"logprobs": True, "top_logprobs": 0}),
        ({"text": {"format": {"type": "json_object"}}}, {"response_format": {"type": "json_object"}}),
        (
            {"text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True}}},
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": SCHEMA, "strict": True},
                }
            },
        ),
        ({"text": {"format": {"type": "text"}, "verbosity": "low"}}, {}),
        ({"reasoning": {"effort": "low", "summary": "auto"}}, {"reasoning_effort": "low"}),
        ({"gate_weights": True, "drafted": True}, {"gate_weights": True, "drafted": True}),
    ],
    ids=lambda fields: next(iter(fields), "none"),
)
async def test_a_field_of_another_name_is_the_chats(
    client: httpx.AsyncClient, engine: ScriptedEngine, ours: dict[str, Any], chats: dict[str, Any]
) -> None:
    one, other = await both(client, engine, ours, chats)
    assert one == other
    if chats:
        assert one != (await both(client, engine, {}, {}))[0] or "reasoning" in ours


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": 3}, "input"),
        ({"model": ""}, "model"),
        ({"instructions": ["Be kind."]}, "instructions"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": -1}, "max_output_tokens"),
        ({"max_output_tokens": "5"}, "max_output_tokens"),
        ({"max_output_tokens": 3, "min_tokens": 5}, "min_tokens"),
        ({"temperature": 9.0}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_logprobs": 100}, "top_logprobs"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ["x"] * 5}, "stop"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"priority": 3}, "priority"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"reasoning": {"effort": "enormous"}}, "reasoning.effort"),
        ({"text": {"verbosity": "shrill"}}, "text.verbosity"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name"),
        ({"text": {"format": {"type": "json_schema", "name": "n", "schema": {"$ref": "#"}}}}, "text.format"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
        ({"gate_weights": 1}, "gate_weights"),
        ({"input": "word " * 300}, "input"),
        ({"input": "word " * 9000}, "input"),
        ({"input": [{"role": "user", "content": "Hi"}] * 5000}, "input"),
    ],
)
async def test_an_error_names_the_clients_field(
    client: httpx.AsyncClient, engine: ScriptedEngine, body: dict[str, Any], param: str
) -> None:
    """vLLM's own class names fields of the chat that nobody sent, or none."""
    for stream in (False, True):
        response = await client.post("/v1/responses", json={"input": "Hi", **body, "stream": stream})
        error = response.json()["error"]
        assert response.status_code == 400, error
        assert error["param"] == param, error
        for foreign in ("max_tokens", "max_completion_tokens", "response_format", "messages"):
            assert foreign not in error["message"]
    assert engine.prompts == []


@pytest.mark.parametrize("body", [b"", b"[]", b'"Hi"', b'{"input": "Hi"', b"null"])
async def test_a_body_that_is_none_is_an_error(client: httpx.AsyncClient, body: bytes) -> None:
    response = await client.post("/v1/responses", content=body, headers={"Content-Type": "application/json"})
    assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")


async def test_a_model_that_is_not_served_is_not_found(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/responses", json={"input": "Hi", "model": "other"})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")


@pytest.mark.parametrize(
    ("method", "path"), [("GET", ""), ("DELETE", ""), ("GET", "/input_items"), ("POST", "/cancel")], ids=str
)
async def test_nothing_is_stored(client: httpx.AsyncClient, ask: Asking, method: str, path: str) -> None:
    response = await ask(store=True)
    answer = await client.request(method, f"/v1/responses/{response['id']}{path}")
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (404, "not_found")
    assert response["id"] in error["message"]


async def test_without_a_parser_auto_is_refused_with_the_way_out(client: httpx.AsyncClient, monkeypatch: Any) -> None:
    app = client._transport.app  # type: ignore[attr-defined]
    monkeypatch.setattr(app.state.serving.chat, "enable_auto_tools", False)
    body = {"input": "Hi", "tools": [{"type": "function", "name": "f"}]}
    error = (await client.post("/v1/responses", json=body)).json()["error"]
    assert error["param"] == "tool_choice"
    assert "tool_call_parser" in error["message"]
    assert (await client.post("/v1/responses", json={**body, "tools": [{"type": "web_search"}]})).status_code == 200
