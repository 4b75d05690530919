"""Anthropic's content blocks become text, calls and results; whatever would be lost is refused by its place."""

from typing import Any

import pytest

from ultrafuser.server.errors import InvalidRequest, UnsupportedParameter
from ultrafuser.server.requests.blocks import BILLING_HEADER, UNOFFERED, plain_messages

BILLING = f"{BILLING_HEADER}: cc_version=2.1.37.0d9; cc_entrypoint=cli; cch=fa690;"
USER = {"role": "user", "content": "Hi"}
CALL = {"type": "tool_use", "id": "a", "name": "look", "input": {"x": 1}}
RESULT = {"type": "tool_result", "tool_use_id": "a", "content": "seen"}
CALLED = [USER, {"role": "assistant", "content": [CALL]}]


def text(words: str, **fields: Any) -> dict[str, Any]:
    """A block of text."""
    return {"type": "text", "text": words, **fields}


def plain(*messages: Any, **fields: Any) -> dict[str, Any]:
    """A body in its plain form."""
    return plain_messages({"messages": list(messages) or [USER], **fields})


@pytest.mark.parametrize(
    ("system", "expected"),
    [
        ("Be brief.", "Be brief."),
        ([text("Be brief.", cache_control={"type": "ephemeral"}), text("Be kind.")], "Be brief.\nBe kind."),
        ([text(BILLING), text("You are Claude Code."), text("Be brief.")], "You are Claude Code.\nBe brief."),
        (f"{BILLING}\nBe brief.", "Be brief."),
        ([text(f"{BILLING}\nBe brief.")], "Be brief."),
        (BILLING, ""),
        ([], ""),
    ],
)
def test_system_text_is_one_string_without_the_line_that_differs_in_each_request(system: Any, expected: str) -> None:
    assert plain(system=system)["system"] == expected
    assert plain(USER, {"role": "system", "content": system})["messages"][1] == {"role": "system", "content": expected}


def test_what_a_user_says_is_kept_whatever_it_begins_with() -> None:
    assert plain({"role": "user", "content": BILLING})["messages"][0]["content"] == BILLING


@pytest.mark.parametrize(
    ("role", "content", "expected"),
    [
        ("user", "Hi", "Hi"),
        ("user", [text("a", citations=None), text("b")], "a\nb"),
        ("user", [], ""),
        ("assistant", [{"type": "redacted_thinking", "data": "x"}, text("Yes.")], "Yes."),
        ("assistant", [{"type": "redacted_thinking", "data": "x"}], ""),
    ],
)
def test_text_is_one_string(role: str, content: Any, expected: str) -> None:
    assert plain({"role": role, "content": content})["messages"] == [{"role": role, "content": expected}]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("seen", "seen"),
        ([text("a"), text("b")], "a\nb"),
        ([{"type": "tool_reference", "tool_name": "look"}], "look"),
        (None, ""),
    ],
)
def test_results_are_text_and_come_first(content: Any, expected: str) -> None:
    turns = plain(*CALLED, {"role": "user", "content": [{**RESULT, "content": content}, text("And?")]})["messages"]
    assert turns[1]["content"] == [CALL]
    assert turns[2]["content"] == [{**RESULT, "content": expected}, text("And?")]


def test_a_result_that_is_an_error_says_so() -> None:
    turns = plain(*CALLED, {"role": "user", "content": [{**RESULT, "is_error": True}]})["messages"]
    assert turns[2]["content"][0]["content"] == "Error: seen"


def test_results_may_come_in_several_turns_and_system_turns_between() -> None:
    other = {**CALL, "id": "b"}
    turns = [USER, {"role": "assistant", "content": [text("Let me see."), CALL]}]
    turns += [{"role": "assistant", "content": [other]}, {"role": "system", "content": "Be quick."}]
    turns += [{"role": "user", "content": [{**RESULT, "tool_use_id": name}]} for name in ("b", "a")]
    assert len(plain(*turns)["messages"]) == 6


def test_tools_keep_what_is_shown_and_their_places() -> None:
    custom = {"type": "custom", "name": "look", "input_schema": {"type": "object"}, "defer_loading": True}
    search = {"type": "web_search_20250305", "name": "web_search", "max_uses": 5}
    tools = plain(tools=[search, {**custom, "description": "Looks", "strict": True, "cache_control": {}}])["tools"]
    kept = {"name": "look", "description": "Looks", "input_schema": {"type": "object"}, "strict": True}
    assert tools == [UNOFFERED, kept]


WRONG: list[tuple[str, dict[str, Any]]] = [
    ("messages", {"messages": []}),
    ("messages", {"messages": "Hi"}),
    ("messages.0", {"messages": ["Hi"]}),
    ("messages.0.role", {"messages": [{"role": "tool", "content": "Hi"}]}),
    ("messages.0.content", {"messages": [{"role": "user"}]}),
    ("messages.0.content", {"messages": [{"role": "user", "content": 5}]}),
    ("messages.0.content.0", {"messages": [{"role": "user", "content": ["Hi"]}]}),
    ("messages.0.content.1.text", {"messages": [{"role": "user", "content": [text("a"), {"type": "text"}]}]}),
    ("messages.1.content.0.id", {"messages": [USER, {"role": "assistant", "content": [{**CALL, "id": 1}]}]}),
    ("messages.1.content.0.input", {"messages": [USER, {"role": "assistant", "content": [{**CALL, "input": "x"}]}]}),
    ("messages.1.content.1.id", {"messages": [USER, {"role": "assistant", "content": [CALL, CALL]}]}),
    ("messages.1.content.0", {"messages": CALLED}),
    ("messages.1.content.0", {"messages": [*CALLED, USER]}),
    ("messages.1.content.0", {"messages": [*CALLED, {"role": "user", "content": [text("a"), RESULT]}]}),
    ("messages.1.content.0", {"messages": [*CALLED, {"role": "user", "content": []}]}),
    ("messages.0.content.0.tool_use_id", {"messages": [{"role": "user", "content": [RESULT]}]}),
    (
        "messages.2.content.1.tool_use_id",
        {"messages": [*CALLED, {"role": "user", "content": [RESULT, RESULT]}]},
    ),
    ("tools.0", {"tools": ["look"]}),
    ("tools.1.name", {"tools": [{"name": "look"}, {"name": 5}]}),
    ("tools.0.name", {"tools": [{"name": ""}]}),
    ("system", {"system": 5}),
    ("system.0.text", {"system": [{"type": "text"}]}),
    ("thinking.budget_tokens", {"thinking": {"type": "enabled"}}),
    ("thinking.budget_tokens", {"thinking": {"type": "enabled", "budget_tokens": 5}}),
    ("thinking.budget_tokens", {"thinking": {"type": "enabled", "budget_tokens": 2000}, "max_tokens": 2000}),
]


@pytest.mark.parametrize(("param", "body"), WRONG)
def test_what_is_wrong_is_named_as_it_was_sent(param: str, body: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=f"^{param}: ") as caught:
        plain_messages({"messages": [USER]} | body)
    assert caught.value.param == param


UNREAD: list[tuple[str, str, Any]] = [
    ("messages.0.content.1", "user", [text("a"), {"type": "image", "source": {}}]),
    ("messages.0.content.0", "user", [{"type": "document", "source": {}}]),
    ("messages.0.content.0", "user", [CALL]),
    ("messages.0.content.0", "user", [{"type": "thinking", "thinking": "hm"}]),
    ("messages.0.content.0", "assistant", [RESULT]),
    ("messages.0.content.0", "assistant", [{"type": "server_tool_use", "id": "a"}]),
    ("messages.0.content.0", "system", [{"type": "tool_addition"}]),
    ("messages.0.content.0", "user", [{"type": "unheard_of"}]),
]


@pytest.mark.parametrize(("param", "role", "content"), UNREAD)
def test_what_cannot_be_read_is_refused_by_its_place(param: str, role: str, content: Any) -> None:
    with pytest.raises(UnsupportedParameter, match=f"^{param}: .* cannot be read") as caught:
        plain({"role": role, "content": content})
    assert caught.value.param == param


@pytest.mark.parametrize("kind", ["image", "document"])
def test_a_file_in_a_result_is_not_lost(kind: str) -> None:
    result = {**RESULT, "content": [text("a"), {"type": kind, "source": {}}]}
    with pytest.raises(UnsupportedParameter) as caught:
        plain(*CALLED, {"role": "user", "content": [result]})
    assert caught.value.param == "messages.2.content.0.content.1"
