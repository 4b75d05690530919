"""Items become the messages that a chat client would have sent; what does not belong together is named by its place."""

import json
from typing import Any

import httpx
import pytest

from tests.server.scripted import ScriptedEngine
from tests.server.serving.responses.conftest import Asking
from ultrafuser.server.errors import InvalidRequest
from ultrafuser.server.serving.responses.input_items import CLIENT_CALLS, LEFT_OUT, messages_of

# vLLM's own request model marks OpenAI's older spelling as deprecated and then reads it itself.
pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated:DeprecationWarning")

USER = {"role": "user", "content": "Hi"}
CALL = {"type": "function_call", "call_id": "a", "name": "f", "arguments": '{"x": 1}'}
RESULT = {"type": "function_call_output", "call_id": "a", "output": "one"}


def said(*texts: str, **more: Any) -> dict[str, Any]:
    """An assistant's message, as a client sends it back."""
    parts = [{"type": "output_text", "text": text, "annotations": [], "logprobs": []} for text in texts]
    return {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed", "content": parts, **more}


def called(call_id: str, name: str = "f", arguments: str = '{"x": 1}') -> dict[str, Any]:
    """A call as a chat message has it."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def test_a_text_is_a_users_turn_behind_the_instructions() -> None:
    assert messages_of("Hi", "Be kind.") == [{"role": "system", "content": "Be kind."}, USER]


def test_every_part_of_every_message_is_read() -> None:
    """Of an assistant's message vLLM reads the first part only, and fails on a refusal or none."""
    refusal = {"type": "refusal", "refusal": "No."}
    items = [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "input_text", "text": "One,"}, {"type": "input_text", "text": "two."}]},
        said("Three,", "four."),
        USER,
        said(content=[refusal]),
        USER,
        said(content=[]),
        USER,
        {"role": "assistant", "content": None},
        USER,
    ]
    texts = [(message["role"], message["content"]) for message in messages_of(items, None)]
    user = ("user", "Hi")
    assert texts == [
        ("developer", "Be brief."),
        ("user", "One,\ntwo."),
        ("assistant", "Three,\nfour."),
        user,
        ("assistant", "No."),
        user,
        ("assistant", ""),
        user,
        ("assistant", ""),
        user,
    ]


def thought(text: str) -> dict[str, Any]:
    return {"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": text}]}


def test_a_thought_belongs_to_the_turn_that_it_begins() -> None:
    """Within a turn, between its calls, it is left out: it came with the next turn's."""
    second = {**CALL, "call_id": "b"}
    results = [RESULT, {**RESULT, "call_id": "b"}]
    items = [USER, thought("A"), CALL, thought("B"), second, *results, thought("C"), said("Done.")]
    turns = [turn for turn in messages_of(items, None) if turn["role"] == "assistant"]
    assert [turn["reasoning"] for turn in turns] == ["A", "C"]


def test_what_another_agent_says_is_a_users_turn() -> None:
    content = [{"type": "input_text", "text": "Hi"}]
    assert messages_of([{"type": "agent_message", "author": "a", "recipient": "b", "content": content}], None) == [USER]


def test_text_and_calls_of_an_answer_are_one_turn() -> None:
    items = [
        USER,
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "gAAA", "content": None},
        said("Let me see."),
        CALL,
        {"type": "custom_tool_call", "call_id": "b", "name": "patch", "input": 'say "x"\n', "status": "completed"},
        said(" Soon."),
        {**RESULT, "call_id": "b", "type": "custom_tool_call_output", "output": [{"type": "input_text", "text": "ok"}]},
        RESULT,
        said("Done."),
        said("Really."),
    ]
    calls = [called("a"), called("b", "patch", json.dumps({"input": 'say "x"\n'}))]
    assert messages_of(items, None)[1:] == [
        {"role": "assistant", "content": "Let me see. Soon.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "b", "content": "ok"},
        {"role": "tool", "tool_call_id": "a", "content": "one"},
        {"role": "assistant", "content": "Done."},
        {"role": "assistant", "content": "Really."},
    ]


def test_calls_of_what_the_client_runs_are_shown_with_their_results() -> None:
    actions = {"action": {"command": ["ls"]}, "operation": {"type": "delete_file", "path": "a"}, "arguments": {"q": 1}}
    outputs: dict[str, Any] = {"shell_call": [{"stdout": "x"}], "apply_patch_call": None}
    for kind, (name, key) in CLIENT_CALLS.items():
        result: dict[str, Any] = {
            "type": f"{kind}_output".replace("search_call", "search"),
            "call_id": "a",
            "status": "completed",
        }
        result["output"] = outputs.get(kind, "x")
        _, turn, answer = messages_of([USER, {"type": kind, "call_id": "a", key: actions[key]}, result], None)
        assert turn["tool_calls"] == [called("a", name, json.dumps(actions[key]))]
        text = {"shell_call": '[{"stdout": "x"}]', "apply_patch_call": "completed", "tool_search_call": "[]"}
        assert answer == {"role": "tool", "tool_call_id": "a", "content": text.get(kind, "x")}


def test_an_output_of_a_local_shell_may_name_its_call_by_id() -> None:
    """So OpenAI's types have it."""
    call = {"type": "local_shell_call", "id": "i", "call_id": "a", "action": {}, "status": "completed"}
    messages = messages_of([USER, call, {"type": "local_shell_call_output", "id": "a", "output": "x"}], None)
    assert messages[-1] == {"role": "tool", "tool_call_id": "a", "content": "x"}


@pytest.mark.parametrize("kind", sorted(LEFT_OUT))
def test_what_only_another_server_could_run_is_left_out(kind: str) -> None:
    assert messages_of([USER, {"type": kind, "id": "x", "call_id": None}], None) == [USER]


def test_a_search_for_tools_that_the_server_ran_is_left_out() -> None:
    search: dict[str, Any] = {"type": "tool_search_call", "call_id": None, "execution": "server", "arguments": {}}
    assert messages_of([USER, search, {"type": "tool_search_output", "call_id": None, "tools": []}], None) == [USER]


@pytest.mark.parametrize(
    ("items", "param"),
    [
        ("", "input"),
        ([], "input"),
        ([{"type": "reasoning", "summary": []}], "input"),
        (["Hi"], "input.0"),
        ([USER, {"type": "telepathy"}], "input.1.type"),
        ([{"type": ["message"]}], "input.0.type"),
        ([{"role": "tool", "content": "x"}], "input.0.role"),
        ([{"role": "user"}], "input.0.content"),
        ([{"role": "user", "content": None}], "input.0.content"),
        ([{"role": "user", "content": [{"type": "input_text", "text": 1}]}], "input.0.content.0.text"),
        ([{"role": "user", "content": [{"type": "input_image", "image_url": "data:"}]}], "input.0.content.0"),
        ([{"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}], "input.0.content.0"),
        ([{"role": "user", "content": [{"type": "telepathy"}]}], "input.0.content.0"),
        ([{"type": "item_reference", "id": "msg_1"}], "input.0"),
        ([{"id": "msg_1"}], "input.0"),
        ([{"type": "compaction", "encrypted_content": "x"}], "input.0"),
        ([{"type": "computer_call_output", "call_id": "a", "output": {}}], "input.0"),
        ([USER, RESULT], "input.1.call_id"),
        ([USER, CALL, RESULT, RESULT], "input.3.call_id"),
        ([USER, CALL, CALL], "input.2.call_id"),
        ([USER, CALL], "input.1"),
        ([USER, CALL, {**CALL, "call_id": "b"}, RESULT, USER], "input.2"),
        ([USER, {**CALL, "arguments": {"x": 1}}], "input.1.arguments"),
        ([USER, {**CALL, "name": None}], "input.1.name"),
        ([USER, {**CALL, "call_id": None}], "input.1.call_id"),
        ([USER, {**CALL, "namespace": 1}], "input.1.namespace"),
        ([USER, CALL, {**RESULT, "output": None}], "input.2.output"),
        ([USER, CALL, {**RESULT, "output": [{"type": "input_image"}]}], "input.2.output.0"),
        ([USER, {"type": "custom_tool_call", "call_id": "a", "name": "p"}], "input.1.input"),
        ([USER, {"type": "shell_call", "call_id": "a"}], "input.1.action"),
    ],
)
def test_what_is_wrong_is_named_by_its_place(items: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        messages_of(items, "Be kind.")
    assert raised.value.param == param
    assert raised.value.message.startswith(param)


async def test_a_conversation_has_one_prompt_on_both_routes(
    client: httpx.AsyncClient, engine: ScriptedEngine, ask: Asking
) -> None:
    """Instructions, a developer's message, calls and their results: each specialist reads the same tokens."""
    parameters = {"type": "object", "properties": {"x": {"type": "integer"}}}
    tool = {"name": "f", "description": "F.", "parameters": parameters, "strict": False}
    items = [{"role": "developer", "content": "Be brief."}, USER, said("Well."), CALL, RESULT, USER]
    await ask(instructions="Be kind.", input=items, tools=[{"type": "function", **tool}])
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "developer", "content": "Be brief."},
        USER,
        {"role": "assistant", "content": "Well.", "tool_calls": [called("a")]},
        {"role": "tool", "tool_call_id": "a", "content": "one"},
        USER,
    ]
    chat = {"messages": messages, "tools": [{"type": "function", "function": tool}], "tool_choice": "auto"}
    assert (await client.post("/v1/chat/completions", json=chat)).status_code == 200
    ours, theirs = engine.prompts
    assert ours["specialist_prompts"] == theirs["specialist_prompts"]
