"""Anthropic's client, unmodified, against a real server; and what Claude Code sends first, by public reports."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import anthropic
import httpx
import openai
import pytest
from pydantic import BaseModel

from tests.e2e.conftest import MODEL, WIDE_KEY
from tests.e2e.process import ServerProcess, wait_for
from tests.fakes import MAX_POSITIONS
from tests.reference import answer
from ultrafuser.gating.model.fusion import load_fusion

HI: list[Any] = [{"role": "user", "content": "Name three colours."}]
NUM_TOKENS = 24
GREEDY: dict[str, Any] = {"model": MODEL, "max_tokens": NUM_TOKENS, "extra_body": {"temperature": 0}}
"""The client has no name for temperature; the API has."""
WEATHER: Any = {
    "name": "get_weather",
    "description": "Weather of a city",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="module")
def claude(server: ServerProcess) -> Iterator[Any]:
    """The official client, which is told every error at once."""
    with anthropic.Anthropic(base_url=server.url, api_key="unused", max_retries=0, timeout=60) as client:
        yield client


def text_of(message: Any) -> str:
    """All that a message says."""
    return "".join(block.text for block in message.content if block.type == "text")


def num_read(usage: Any) -> int:
    """All tokens of a prompt."""
    total: int = usage.input_tokens + usage.cache_read_input_tokens + usage.cache_creation_input_tokens
    return total


def test_the_answer_is_the_references_and_the_chats(claude: Any, client: openai.OpenAI, tiny_fusion: Path) -> None:
    system = "Be brief."
    messages = [{"role": "system", "content": system}, *HI]
    expected, prompts = answer(load_fusion(tiny_fusion), messages, max_new_tokens=NUM_TOKENS)
    assert expected.top2_gap.min() > 1e-3
    message = claude.messages.create(system=system, messages=HI, **GREEDY)
    chat: Any = client.chat.completions.create(
        model=MODEL, messages=messages, temperature=0, max_tokens=NUM_TOKENS, extra_body={"return_token_ids": True}
    )
    assert chat.choices[0].token_ids == expected.token_ids
    assert text_of(message) == chat.choices[0].message.content
    assert message.usage.output_tokens == len(expected.token_ids)
    assert num_read(message.usage) == max(len(prompt) for prompt in prompts)
    counted = claude.messages.count_tokens(model=MODEL, system=system, messages=HI)
    assert counted.input_tokens == num_read(message.usage)


def test_a_stream_says_the_same_in_pieces(claude: Any) -> None:
    whole = claude.messages.create(messages=HI, **GREEDY)
    with claude.messages.stream(messages=HI, **GREEDY) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == text_of(whole) == text_of(final)
    assert (final.stop_reason, final.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)
    assert final.stop_reason == "max_tokens"


def test_a_second_turn_finds_the_first_in_the_cache(claude: Any) -> None:
    question = {"role": "user", "content": "Tell me a long story about a lighthouse and its keeper. " * 4}
    first = claude.messages.create(messages=[question], **GREEDY)
    turns: list[Any] = [
        question,
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": "And then?"},
    ]
    second = claude.messages.create(messages=turns, **GREEDY)
    assert second.usage.cache_read_input_tokens > 0
    counted = claude.messages.count_tokens(model=MODEL, messages=turns).input_tokens
    assert counted == num_read(second.usage)
    with claude.messages.stream(messages=turns, **GREEDY) as stream:
        for event in stream:
            if event.type == "message_start":
                started = event.message.usage.model_copy()
        final = stream.get_final_message()
    assert started.cache_read_input_tokens == final.usage.cache_read_input_tokens > 0
    assert (started.input_tokens, num_read(started)) == (final.usage.input_tokens, counted)
    assert text_of(final) == text_of(second)


def test_a_demanded_call_and_its_result(claude: Any) -> None:
    options: dict[str, Any] = GREEDY | {"max_tokens": 200, "tools": [WEATHER]}
    asked = claude.messages.create(messages=HI, tool_choice={"type": "tool", "name": "get_weather"}, **options)
    (call,) = asked.content
    assert asked.stop_reason == "tool_use"
    assert call.type == "tool_use"
    assert call.input["city"] in ("Oslo", "Rome")
    with claude.messages.stream(
        messages=HI, tool_choice={"type": "any", "disable_parallel_tool_use": True}, **options
    ) as stream:
        streamed = stream.get_final_message()
    assert [(block.name, block.input) for block in streamed.content] == [(call.name, call.input)]
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "Rain."}]}
    turns = [*HI, {"role": "assistant", "content": asked.content}, {"role": "user", "content": [result]}]
    after = claude.messages.create(messages=turns, **(options | {"max_tokens": 8}))
    assert after.usage.output_tokens == 8


@pytest.mark.parametrize("max_tokens", [1, 4, 20])
def test_a_demanded_call_that_the_limit_cuts(claude: Any, max_tokens: int) -> None:
    options: dict[str, Any] = GREEDY | {"max_tokens": max_tokens, "tools": [WEATHER], "tool_choice": {"type": "any"}}
    message = claude.messages.create(messages=HI, **options)
    assert (message.stop_reason, text_of(message)) == ("max_tokens", "")


class City(BaseModel):
    """What is to be told of a city."""

    name: Literal["Oslo", "Rome"]
    is_capital: bool


def test_a_structured_answer_parses(claude: Any) -> None:
    message = claude.messages.parse(messages=HI, output_format=City, **(GREEDY | {"max_tokens": 200}))
    assert isinstance(message.parsed_output, City)
    assert message.stop_reason == "end_turn"


def test_a_stop_sequence_ends_the_answer_before_it(claude: Any) -> None:
    text = text_of(claude.messages.create(messages=HI, **GREEDY))
    stop = text[8:10]
    message = claude.messages.create(messages=HI, stop_sequences=[stop], **GREEDY)
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop)
    assert text_of(message) == text[: text.index(stop)]
    with claude.messages.stream(messages=HI, stop_sequences=[stop], **GREEDY) as stream:
        final = stream.get_final_message()
    assert (final.stop_reason, final.stop_sequence, text_of(final)) == ("stop_sequence", stop, text_of(message))


def test_the_contexts_end_is_told_from_the_limit(claude: Any) -> None:
    message = claude.messages.create(messages=HI, **(GREEDY | {"max_tokens": 32000}))
    assert message.stop_reason == "model_context_window_exceeded"
    assert num_read(message.usage) + message.usage.output_tokens == MAX_POSITIONS


def test_errors_are_raised_as_the_client_knows_them(claude: Any) -> None:
    with pytest.raises(anthropic.NotFoundError) as missing:
        claude.messages.create(messages=HI, **(GREEDY | {"model": "claude"}))
    assert missing.value.type == "not_found_error"
    image: Any = {"type": "image", "source": {"type": "url", "url": "http://example.org/a.png"}}
    with pytest.raises(anthropic.BadRequestError, match=r"messages\.0\.content\.0: "):
        claude.messages.create(messages=[{"role": "user", "content": [image]}], **GREEDY)


def test_a_client_that_leaves_ends_its_request(claude: Any, server: ServerProcess) -> None:
    def num_aborted() -> int:
        return server.log.count("/v1/messages' 499")

    before = num_aborted()
    with claude.messages.create(messages=HI, stream=True, **(GREEDY | {"max_tokens": 3500})) as stream:
        for event in stream:
            if event.type == "content_block_delta":
                break
    wait_for(lambda: num_aborted() > before, "the client's leaving is noticed", 20)
    wait_for(
        lambda: (
            'vllm:num_requests_running{engine="0",model_name="tiny"} 0.0' in httpx.get(f"{server.url}/metrics").text
        ),
        "the request has ended",
        20,
    )


# Claude Code

INSTRUCTIONS = "You are an interactive CLI tool that helps users with software engineering tasks. " * 125


def tool(name: str, **fields: Any) -> dict[str, Any]:
    """One of Claude Code's tools."""
    properties = {"path": {"type": "string", "description": "What to look at"}, "limit": {"type": "number"}}
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", "type": "object", "properties": properties}
    return {"name": name, "description": f"{name}s files.", "input_schema": {**schema, "required": ["path"]}, **fields}


def first_request(number: int) -> dict[str, Any]:
    """What Claude Code sends first; the first block of system text is another one each time."""
    short_lived = {"cache_control": {"type": "ephemeral"}}
    names = ("Bash", "Edit", "Glob", "Grep", "Read", "Write", "Task", "TodoWrite", "WebFetch", "Skill", "ExitPlanMode")
    system = [
        {
            "type": "text",
            "text": f"x-anthropic-billing-header: cc_version=2.1.37.0d9; cc_entrypoint=cli; cch=fa69{number};",
        },
        {"type": "text", "text": "You are Claude Code, Anthropic's official CLI for Claude.", **short_lived},
        {"type": "text", "text": INSTRUCTIONS, **short_lived},
    ]
    reminder = (
        "<system-reminder>\nAs you answer the user's questions, you can use the following context.\n</system-reminder>"
    )
    user = [{"type": "text", "text": reminder}, {"type": "text", "text": "Explain this repository", **short_lived}]
    return {
        "model": MODEL,
        "max_tokens": 32000,
        "stream": True,
        "temperature": 1,
        "metadata": {"user_id": "user_5f0c_account__session_9d1e"},
        "system": system,
        "messages": [{"role": "user", "content": user}, {"role": "system", "content": "The user opened main.py."}],
        "tools": [
            *map(tool, names),
            tool("mcp__github__list", defer_loading=True, eager_input_streaming=True),
            tool("Agent", type="custom", strict=True, **short_lived),
            {"type": "web_search_20250305", "name": "web_search", "max_uses": 8},
            {"type": "tool_search_tool_regex_20251119", "name": "tool_search_tool_regex"},
        ],
        "thinking": {"type": "adaptive"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "high"},
    }


HEADERS = {
    "anthropic-version": "2023-06-01",
    "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14,context-management-2025-06-27",
    "anthropic-dangerous-direct-browser-access": "true",
    "x-app": "cli",
    "x-stainless-retry-count": "0",
    "user-agent": "claude-cli/2.1.37 (external, cli)",
}


@pytest.mark.slow
def test_claude_codes_first_exchange_is_answered_and_then_found_in_the_cache(wide_server: ServerProcess) -> None:
    key = {"authorization": f"Bearer {WIDE_KEY}"}
    body = first_request(0)
    counted = httpx.post(
        f"{wide_server.url}/v1/messages/count_tokens?beta=true",
        json={name: body[name] for name in ("model", "messages", "system", "tools", "thinking", "output_config")},
        headers=HEADERS | key,
        timeout=60,
    ).json()["input_tokens"]
    assert counted > 10_000
    found = []
    for number in range(2):
        url = f"{wide_server.url}/v1/messages?beta=true"
        own = first_request(number) | {"max_tokens": 24}
        with httpx.stream("POST", url, json=own, headers=HEADERS | key, timeout=60) as response:
            assert response.status_code == 200, response.read()
            events = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: ")]
        assert events[-1] == {"type": "message_stop"}
        found.append(events[0]["message"]["usage"])
        assert events[-2]["usage"]["output_tokens"] >= 1
    kinds = ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
    assert [sum(usage[kind] for kind in kinds) for usage in found] == [counted, counted]
    assert found[0]["cache_read_input_tokens"] == 0
    assert found[1]["cache_read_input_tokens"] > 0.9 * counted


@pytest.mark.slow
def test_the_key_is_taken_as_either_kind_of_client_sends_it(wide_server: ServerProcess) -> None:
    url, options = wide_server.url, dict[str, Any](max_retries=0, timeout=60)
    for own in ({"auth_token": WIDE_KEY}, {"api_key": WIDE_KEY, "default_headers": {"x-api-key": WIDE_KEY}}):
        with anthropic.Anthropic(base_url=url, **options, **own) as client:
            assert client.messages.create(messages=HI, **(GREEDY | {"max_tokens": 2})).usage.output_tokens
    with (
        anthropic.Anthropic(base_url=url, api_key="wrong", **options) as client,
        pytest.raises(anthropic.AuthenticationError) as wrong,
    ):
        client.messages.create(messages=HI, **GREEDY)
    assert wrong.value.type == "authentication_error"
    assert wrong.value.request_id
    assert httpx.get(f"{url}/v1/models", headers={"x-api-key": WIDE_KEY}).status_code == 200
