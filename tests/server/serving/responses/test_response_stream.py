"""A response's items, events and ends, over an engine whose every token is written down beforehand."""

import asyncio
import json
from typing import Any

import httpx
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from tests.response_events import parsed
from tests.server.scripted import SCRIPT, ScriptedEngine
from tests.server.serving.responses.conftest import Asking
from tests.server.serving.responses.test_toolbox import CUSTOM, FUNCTION, SPACE
from ultrafuser.server.engine.client.nonfinite import NonfiniteOutputError
from ultrafuser.server.errors import ShuttingDown
from ultrafuser.server.serving.responses.input_items import messages_of
from ultrafuser.server.serving.responses.response_stream import BEGIN_SECONDS, ResponseStream
from ultrafuser.server.serving.responses.toolbox import Toolbox

# vLLM's own request model marks OpenAI's older spelling as deprecated and then reads it itself.
pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated:DeprecationWarning")

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
PATCH = '*** Begin Patch\n+ "quoted"\n*** End Patch'
MARKS = {"gate_weights": True, "drafted": True}


def call(name: str, arguments: str) -> str:
    """A call as the model writes it."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def without_ids(response: dict[str, Any]) -> dict[str, Any]:
    """A response, but for what differs each time."""
    times = ("id", "created_at", "completed_at")
    items = [{key: value for key, value in item.items() if key not in ("id", "call_id")} for item in response["output"]]
    return {key: value for key, value in response.items() if key not in times} | {"output": items}


def check(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The events are in OpenAI's order and agree with each other; returns the last one's response."""
    for event in events:
        EVENT.validate_python(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert events[0]["response"] == events[1]["response"]
    assert events[0]["response"]["status"] == "in_progress"
    last = events[-1]["response"]
    assert events[-1]["type"] == f"response.{last['status']}"
    assert last["id"] == events[0]["response"]["id"]
    opened: dict[int, str] = {}
    closed: list[int] = []
    texts: dict[int, str] = {}
    for event in events[2:-1]:
        if event["type"] == "error":
            continue
        index = event["output_index"]
        if event["type"] == "response.output_item.added":
            assert index == len(opened)
            assert event["item"]["status"] == "in_progress"
            opened[index], texts[index] = event["item"]["id"], ""
        assert index not in closed
        if event["type"] == "response.output_item.done":
            assert event["item"]["id"] == opened[index]
            assert event["item"] == last["output"][index]
            closed.append(index)
        elif "item_id" in event:
            assert event["item_id"] == opened[index]
        if event["type"].endswith(".delta"):
            texts[index] += event["delta"]
        if event["type"].endswith((".text.done", "arguments.done", "input.done")):
            assert texts[index] == event.get("text", event.get("arguments", event.get("input")))
    assert [item["id"] for item in last["output"]] == list(opened.values())
    if last["status"] != "failed":
        assert sorted(closed) == sorted(opened)
    for index, item in enumerate(last["output"]):
        told = item["content"][0]["text"] if item["type"] == "message" else item.get("arguments", item.get("input"))
        assert told == texts[index]
    return last


async def test_a_text_is_a_message_whose_events_are_in_order(events: Asking, ask: Asking) -> None:
    told = await events()
    kinds = [event["type"].removeprefix("response.") for event in told]
    num_deltas = kinds.count("output_text.delta")
    assert num_deltas > 3
    assert kinds == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *["output_text.delta"] * num_deltas,
        *("output_text.done", "content_part.done", "output_item.done", "completed"),
    ]
    response = check(told)
    assert response["output"][0]["content"][0]["text"] == SCRIPT
    whole = await ask()
    Response.model_validate(whole)
    assert without_ids(whole) == without_ids(response)
    assert whole["usage"]["total_tokens"] == whole["usage"]["input_tokens"] + whole["usage"]["output_tokens"]
    assert isinstance(whole["created_at"], int)


async def test_what_was_asked_stands_in_the_response(client: httpx.AsyncClient) -> None:
    asked: dict[str, Any] = {
        "instructions": "Be kind.",
        "max_output_tokens": 50,
        "metadata": {"a": "b"},
        "prompt_cache_key": "key",
        "reasoning": {"effort": "low", "summary": "auto"},
        "safety_identifier": "s",
        "temperature": 0.5,
        "top_p": 0.9,
        "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}, "verbosity": "low"},
        "user": "u",
        "truncation": "disabled",
        "background": False,
    }
    body = {"input": "Hi", "store": True, "service_tier": "auto", "parallel_tool_calls": False, **asked}
    response = await client.post("/v1/responses", json=body, headers={"X-Request-Id": "mine"})
    told = response.json()
    assert {key: told[key] for key in asked} == asked
    assert (told["id"], told["error"], told["model"]) == ("resp_mine", None, "tiny")
    assert (told["store"], told["service_tier"], told["parallel_tool_calls"]) == (False, "default", False)


async def test_calls_are_items_under_the_clients_names(engine: ScriptedEngine, events: Asking, ask: Asking) -> None:
    patch = json.dumps({"input": PATCH}, ensure_ascii=False)
    engine.script = "Let me see.\n" + call("f", '{"x": 1}') + call("patch", patch) + call("mcp__f", '{"x": 2}')
    tools = [{"type": "function", "name": "f"}, {"type": "custom", "name": "patch"}, SPACE]
    response = check(await events(tools=tools))
    assert response["status"] == "completed"
    assert [item["type"] for item in response["output"]] == [
        *("message", "function_call", "custom_tool_call", "function_call")
    ]
    _, one, two, three = response["output"]
    assert (one["name"], one.get("namespace"), json.loads(one["arguments"])) == ("f", None, {"x": 1})
    assert (two["name"], two["input"]) == ("patch", PATCH)
    assert (three["name"], three["namespace"], json.loads(three["arguments"])) == ("f", "mcp", {"x": 2})
    assert len({item["call_id"] for item in (one, two, three)}) == 3
    assert without_ids(await ask(tools=tools)) == without_ids(response)


async def test_an_input_that_is_no_object_is_told_as_it_stands(engine: ScriptedEngine, events: Asking) -> None:
    engine.script = call("patch", '{"text": "x"}')
    (item,) = check(await events(tools=[CUSTOM]))["output"]
    assert json.loads(item["input"]) == {"text": "x"}


async def test_a_limit_leaves_the_last_item_and_the_response_incomplete(
    engine: ScriptedEngine, events: Asking, ask: Asking
) -> None:
    response = check(await events(max_output_tokens=3))
    assert response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert [item["status"] for item in response["output"]] == ["incomplete"]
    assert without_ids(await ask(max_output_tokens=3)) == without_ids(response)
    engine.script = call("f", '{"x": 1}') + call("f", '{"x": 23456789}')
    tokens = engine.renderer.get_tokenizer().encode(engine.script, add_special_tokens=False)
    response = check(await events(tools=[FUNCTION], max_output_tokens=len(tokens) - 17))
    assert [item["status"] for item in response["output"]] == ["completed", "incomplete"]
    assert response["output"][1]["arguments"].startswith('{"x":')


async def test_a_failure_ends_the_stream_as_failed_with_what_there_was(
    engine: ScriptedEngine, client: httpx.AsyncClient, events: Asking
) -> None:
    engine.failure, engine.fails_at = NonfiniteOutputError(), 3
    told = await events()
    assert [event["type"] for event in told[-2:]] == ["error", "response.failed"]
    assert told[-2]["error"]["code"] == told[-2]["code"] == "nonfinite_output"
    assert "not a finite number" in told[-2]["message"]
    response = check(told)
    assert response["error"] == {"code": "server_error", "message": told[-2]["message"]}
    assert (response["output"][0]["status"], response["usage"]) == ("incomplete", None)
    whole = await client.post("/v1/responses", json={"input": "Hi"})
    assert (whole.status_code, whole.json()["error"]["code"]) == (500, "nonfinite_output")


async def test_what_the_engine_refuses_at_once_is_a_status(engine: ScriptedEngine, client: httpx.AsyncClient) -> None:
    engine.failure = NonfiniteOutputError()
    response = await client.post("/v1/responses", json={"input": "Hi", "stream": True})
    assert response.status_code == 500


async def test_marks_of_every_token_are_told_once(
    engine: ScriptedEngine, client: httpx.AsyncClient, events: Asking
) -> None:
    engine.script = "Let me see.\n" + call("f", '{"x": 1}')
    told = await events(tools=[FUNCTION], **MARKS)
    response = check(told)
    num_tokens = response["usage"]["output_tokens"]
    assert response["specialists"] == ["text", "code", "math"]
    for name in MARKS:
        content = [mark for event in told for mark in event.get(name, {}).get("content", [])]
        own = response[name]["content"]
        assert len(own) == num_tokens
        assert own[: len(content)] == content
        assert len(content) > num_tokens / 2
        assert response[name]["mean"] is not None
    assert "gate_weights" not in check(await events())
    wrong = await client.post("/v1/responses", json={"input": "Hi", "gate_weights": "yes"})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "gate_weights")


async def test_log_probabilities_stand_with_their_text(engine: ScriptedEngine, events: Asking) -> None:
    told = await events(include=["message.output_text.logprobs"], top_logprobs=1)
    response = check(told)
    own = response["output"][0]["content"][0]["logprobs"]
    assert len(own) == response["usage"]["output_tokens"]
    deltas = [entry for event in told if event["type"].endswith("text.delta") for entry in event["logprobs"]]
    assert deltas == own
    engine.script = call("f", '{"x": 1}')
    assert check(await events(tools=[FUNCTION], top_logprobs=1))["output"][0]["type"] == "function_call"


# The stream by itself


def stream_of(*deltas: dict[str, Any], tools: Any = (), silence: float = 0.0) -> tuple[ResponseStream, list[str]]:
    """A response out of these deltas of a chat, and what becomes of the chat."""
    fate: list[str] = []

    async def chunks() -> Any:
        try:
            await asyncio.sleep(silence)
            for delta in deltas:
                yield f"data: {json.dumps({'choices': [{'delta': delta}]})}\n\n"
            yield f"data: {json.dumps({'choices': [{'delta': {}, 'finish_reason': 'stop'}]})}\n\n"
            yield "data: [DONE]\n\n"
        finally:
            fate.append("closed")

    shown = {"id": "resp_1", "object": "response", "created_at": 1, "model": "m", "parallel_tool_calls": True}
    shown |= {"tool_choice": "auto", "tools": []}
    return ResponseStream(shown, Toolbox(tools, ""), chunks()), fate


async def read(stream: ResponseStream) -> list[dict[str, Any]]:
    """All its events."""
    return parsed("".join([event async for event in stream.events()]))


def begun(index: int, name: str, arguments: str) -> dict[str, Any]:
    """The first delta of a call."""
    return {"index": index, "id": f"c{index}", "function": {"name": name, "arguments": arguments}}


async def test_an_answer_without_a_token_is_an_empty_text_that_can_be_sent_back() -> None:
    stream, _ = stream_of()
    (message,) = check(await read(stream))["output"]
    assert message["content"][0]["text"] == ""
    user = {"role": "user", "content": "Hi"}
    assert messages_of([user, message, user], None) == [user, {"role": "assistant", "content": ""}, user]


async def test_two_calls_in_one_delta_are_two_items() -> None:
    stream, _ = stream_of({"content": "a", "tool_calls": [begun(0, "f", "{}"), begun(1, "g", '{"x": 1}')]})
    response = check(await read(stream))
    assert [item.get("arguments") for item in response["output"]] == [None, "{}", '{"x": 1}']


async def test_the_rest_of_a_call_may_come_after_the_next_has_begun() -> None:
    """A parser that reads its text again at the end finds what it has not told."""
    late = {"index": 0, "function": {"arguments": "}"}}
    stream, _ = stream_of(
        {"tool_calls": [begun(0, "f", "{")]}, {"tool_calls": [begun(1, "g", "{}")]}, {"tool_calls": [late]}
    )
    response = check(await read(stream))
    assert [item["arguments"] for item in response["output"]] == ["{}", "{}"]


async def test_text_behind_a_call_is_a_message_of_its_own() -> None:
    stream, _ = stream_of({"content": "a"}, {"tool_calls": [begun(0, "f", "{}")]}, {"content": "b"}, {"content": "c"})
    response = check(await read(stream))
    assert [item["type"] for item in response["output"]] == ["message", "function_call", "message"]
    assert response["output"][2]["content"][0]["text"] == "bc"


async def test_a_stream_begins_while_the_engine_is_still_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ultrafuser.server.serving.responses.response_stream.BEGIN_SECONDS", 0.01)
    stream, fate = stream_of({"content": "a"}, silence=0.1)
    events = stream.events()
    first = parsed(await anext(events))
    assert [event["type"] for event in first] == ["response.created", "response.in_progress"]
    assert fate == []
    rest = parsed("".join([event async for event in events]))
    check([*first, *rest])


async def test_a_client_that_leaves_a_silent_stream_closes_the_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ultrafuser.server.serving.responses.response_stream.BEGIN_SECONDS", 0.01)
    stream, fate = stream_of({"content": "a"}, silence=60)
    events = stream.events()
    await anext(events)
    await events.aclose()
    assert fate == ["closed"]
    assert BEGIN_SECONDS == 1.0


async def test_a_stream_that_is_ended_from_outside_ends_as_failed() -> None:
    stream, _ = stream_of({"content": "a"}, {"content": "b"})
    events = stream.events()
    begun_ = parsed(await anext(events))
    response = check([*begun_, *parsed(stream.last_events(ShuttingDown()))])
    assert response["error"]["code"] == "server_error"
    before, _ = stream_of({"content": "a"})
    assert check(parsed(before.last_events(ShuttingDown())))["output"] == []
