"""Messages as the official client sends, and sends back, them: all text of a turn is read, the rest refused by name."""

from collections.abc import Iterator
from typing import Any, get_args

import httpx
import pytest
from openai.types.chat import ChatCompletionMessage, ChatCompletionMessageParam
from vllm.renderers.chat_utils import TEXT_PART_TYPES

from tests.server.openai_types import example, fields_of, item_of, kinds_of
from tests.server.scripted import ScriptedEngine
from tests.server.test_app import check_error
from ultrafuser.gating.templates import TEXT_PARTS

# vLLM's own request model marks OpenAI's older spelling as deprecated and then reads it itself.
pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated:DeprecationWarning")

CHAT, TOKENIZE, ANALYZE = "/v1/chat/completions", "/tokenize", "/v1/gate/analyze"
USER = {"role": "user", "content": "Hi"}
AGAIN = {"role": "user", "content": "Go on."}
ASSISTANT = {"role": "assistant", "content": "No."}


def around(message: dict[str, Any]) -> list[dict[str, Any]]:
    """A conversation with this turn in it."""
    before = [] if message["role"] in ("system", "developer") else [USER]
    return [*before, message, AGAIN]


async def prompts(client: httpx.AsyncClient, engine: ScriptedEngine, message: dict[str, Any]) -> Any:
    """The n prompts that a conversation with this turn becomes."""
    engine.prompts.clear()
    response = await client.post(CHAT, json={"messages": around(message)})
    assert response.status_code == 200, (message, response.text)
    return engine.prompts[0]["specialist_prompts"]


def parts_of_roles() -> Iterator[tuple[str, dict[str, Any]]]:
    """Each kind of part that the client's types have for each role, filled in."""
    for model in get_args(ChatCompletionMessageParam):
        (role,) = get_args(kinds_of(fields_of(model)["role"])[0])
        for kind in kinds_of(fields_of(model)["content"]):
            for part in kinds_of(item_of(kind)) if item_of(kind) is not None else ():
                yield role, example(part)


PARTS = list(parts_of_roles())


def test_the_client_has_parts_of_these_kinds() -> None:
    assert {(role, part["type"]) for role, part in PARTS} >= {
        *((role, "text") for role in ("system", "developer", "user", "assistant", "tool")),
        ("assistant", "refusal"),
        *(("user", kind) for kind in ("image_url", "input_audio", "file")),
    }
    assert TEXT_PARTS.keys() == TEXT_PART_TYPES - {"thinking"}  # vLLM's; a thought is not what was said


async def test_every_part_is_read_or_refused_by_name(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    for role, part in PARTS:
        more = {"tool_call_id": "1"} if role == "tool" else {}
        for content, position in (([part], 0), (["One.", part, {"type": "text", "text": "Two."}], 1)):
            message = {"role": role, "content": content, **more}
            if part["type"] in ("text", "refusal"):
                whole = {**message, "content": "text" if len(content) == 1 else "One.\ntext\nTwo."}
                assert await prompts(client, engine, message) == await prompts(client, engine, whole), message
                continue
            place = f"messages.{around(message).index(message)}.content.{position}"
            for url, extra in ((CHAT, {}), (TOKENIZE, {}), (ANALYZE, {"answer": "Yes"})):
                response = await client.post(url, json={"messages": around(message), **extra})
                error = check_error(response, 400, place, "unsupported_parameter")
                assert part["type"] in error["message"]


REFUSALS: list[dict[str, Any]] = [
    {"content": [{"type": "refusal", "refusal": "No."}]},
    {"content": [{"type": "output_text", "text": "No.", "annotations": []}]},
    {"content": ["No."]},
    {"content": None, "refusal": "No."},
    {"content": "", "refusal": "No."},
    {"content": [], "refusal": "No."},
    {"refusal": "No.", "tool_calls": []},
    {"refusal": "No.", "reasoning_content": "Hm.", "name": "Ann", "tool_calls": None},
    {"refusal": "No.", "reasoning": "Hm.", "annotations": [], "audio": None, "function_call": None},
    {"content": "No.", "refusal": None},
    {"content": "No.", "refusal": ""},
]


async def test_a_refusal_is_what_the_assistant_said(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    """As a part it was a 400; beside a field that is not OpenAI's it was lost."""
    wanted = await prompts(client, engine, ASSISTANT)
    for message in REFUSALS:
        assert await prompts(client, engine, {"role": "assistant", **message}) == wanted, message
    both: dict[str, Any] = {"role": "assistant", "content": "Well.", "refusal": "No.", "reasoning": "Hm."}
    assert await prompts(client, engine, both) == await prompts(client, engine, ASSISTANT | {"content": "Well.\nNo."})


async def test_what_the_client_got_it_may_send_back(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    """`model_dump` writes every field; `content` null together with `tool_calls` null was a 400."""
    answered = (await client.post(CHAT, json={"messages": [USER]})).json()["choices"][0]["message"]
    ours = ChatCompletionMessage.model_validate(answered)
    refused = ChatCompletionMessage(role="assistant", refusal="No.")
    for message, text in ((ours, answered["content"]), (refused, "No.")):
        wanted = await prompts(client, engine, {"role": "assistant", "content": text})
        for dumped in (message.model_dump(), message.model_dump(exclude_none=True), message.to_dict()):
            assert await prompts(client, engine, dumped) == wanted
    assert await prompts(client, engine, answered) == await prompts(client, engine, ours.model_dump())


async def test_a_turn_without_content_is_empty(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    wanted = await prompts(client, engine, {"role": "assistant", "content": ""})
    contents: tuple[dict[str, Any], ...] = ({"content": []}, {"content": None}, {})
    for content in contents:
        assert await prompts(client, engine, {"role": "assistant", **content}) == wanted
    for role in ("system", "developer", "user", "tool"):
        more = {"tool_call_id": "1"} if role == "tool" else {}
        wanted = await prompts(client, engine, {"role": role, "content": "", **more})
        assert await prompts(client, engine, {"role": role, "content": [], **more}) == wanted


REFUSED = "unsupported_parameter"
WRONG: list[tuple[dict[str, Any], str, str | None]] = [
    ({"role": "assistant", "refusal": 5}, "messages.1.refusal", None),
    ({"role": "assistant", "content": [{"type": "refusal"}]}, "messages.1.content.0.refusal", None),
    ({"role": "assistant", "content": [{"type": "refusal", "text": "No."}]}, "messages.1.content.0.refusal", None),
    ({"role": "user", "content": [{"type": "text"}]}, "messages.1.content.0.text", None),
    ({"role": "user", "content": [{"type": "text", "text": 5}]}, "messages.1.content.0.text", None),
    ({"role": "user", "content": [{"text": "Hi", "image_url": "a"}]}, "messages.1.content.0", REFUSED),
    ({"role": "user", "content": [{"type": ["text"]}]}, "messages.1.content.0", REFUSED),
    ({"role": "user", "content": [5]}, "messages.1.content", None),
    ({"role": "user", "content": {"type": "text"}}, "messages.1.content", None),
    (
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm."}]},
        "messages.1.content.0",
        "unsupported_parameter",
    ),
    ({"role": "assistant", "content": [{"type": "image_url"}]}, "messages.1.content.0", REFUSED),
    ({"role": "assistant", "audio": {"id": "a"}}, "messages.1.audio", REFUSED),
    (
        {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}},
        "messages.1.function_call",
        "unsupported_parameter",
    ),
    ({"role": "function", "name": "f", "content": "five"}, "messages", None),
]


async def test_what_cannot_be_read_is_named_in_one_line(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    for message, param, code in WRONG:
        for url, more in ((CHAT, {}), (TOKENIZE, {}), (ANALYZE, {"answer": "Yes"})):
            response = await client.post(url, json={"messages": around(message), **more})
            error = check_error(response, 400, param, code)
            assert "\n" not in error["message"]
    assert engine.prompts == []
