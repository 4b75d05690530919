"""Items of an input as messages of a chat.

Items that the assistant wrote one after the other (text, calls) are one turn. A call is followed by its result, if not
at once: an item that answers no call is refused, and a call that no item answers. Calls of tools that the client runs
are shown as calls, whatever their kind; what only its own server could run or read is left out (`LEFT_OUT`), or refused
where the conversation would not be the same without it. Knows JSON items, no templates.
"""

import json
from collections.abc import Mapping
from typing import Any

from ultrafuser.gating.templates import text_of_message
from ultrafuser.server.errors import InvalidRequest
from ultrafuser.server.requests.plain import check_parts
from ultrafuser.server.requests.unsupported import refused
from ultrafuser.server.serving.responses.toolbox import encode_input, flat_name

ROLES = ("system", "developer", "user", "assistant")

CLIENT_CALLS: Mapping[str, tuple[str, str]] = {
    "local_shell_call": ("local_shell", "action"),
    "shell_call": ("shell", "action"),
    "apply_patch_call": ("apply_patch", "operation"),
    "tool_search_call": ("tool_search", "arguments"),
}
"""Calls of tools that the client has and a request does not describe: what they are shown as, and the key of what they
were called with."""

RESULTS = (
    "function_call_output",
    "custom_tool_call_output",
    "local_shell_call_output",
    "shell_call_output",
    "apply_patch_call_output",
    "tool_search_output",
)
"""Kinds of items that answer a call."""

LEFT_OUT = frozenset(
    {
        "additional_tools",  # read with the tools
        "web_search_call",
        "file_search_call",
        "code_interpreter_call",
        "image_generation_call",
        "mcp_list_tools",
        "mcp_call",
        "mcp_approval_request",
        "mcp_approval_response",
        "program",
        "program_output",
        "configuration_update",
    }
)
"""Kinds of items that are accepted and not shown."""

REFUSED_KINDS: Mapping[str, str] = {
    "item_reference": "this server stores nothing; send the item itself",
    "compaction": "only the server that wrote it can read it; send the items themselves",
    "compaction_summary": "only the server that wrote it can read it; send the items themselves",
    "context_compaction": "only the server that wrote it can read it; send the items themselves",
    "compaction_trigger": "send fewer items instead",
    "computer_call": "only text is fused",
    "computer_call_output": "only text is fused",
}
"""Kinds of items without which the conversation would be another, and what to do instead."""


def messages_of(items: str | list[Any], instructions: str | None) -> list[dict[str, Any]]:
    """The messages that an input is, its instructions first.

    Raises:
        InvalidRequest, UnsupportedParameter: an item is none, has something else than text, or a call and its result do
            not belong together; names its place, such as `input.3.content.0`.
    """
    turns = _Turns()
    if instructions:
        turns.add_message("system", instructions)
    if isinstance(items, str):
        items = [{"role": "user", "content": items}] if items else []
    for index, item in enumerate(items):
        _add(turns, f"input.{index}", item)
    turns.check_answered()
    if len(turns.messages) == bool(instructions):
        raise InvalidRequest("input: is empty; send a text or at least one message.", "input")
    return turns.messages


class _Turns:
    """The messages so far."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self._waiting: dict[str, str] = {}  # calls without a result, and their places
        self._calls: set[str] = set()
        self._thought = ""  # before the assistant's next turn

    def add_thought(self, text: str) -> None:
        """What was thought before what the assistant says next; within a turn it is left out."""
        self._thought += text

    def add_message(self, role: str, text: str) -> None:
        """A message; what the assistant says between or after its calls belongs to their turn."""
        turn = self._assistants_turn()
        if role == "assistant" and turn is not None and "tool_calls" in turn:
            turn["content"] += text
        else:
            self._begin_turn(role, text)

    def _begin_turn(self, role: str, text: str) -> dict[str, Any]:
        turn: dict[str, Any] = {"role": role, "content": text}
        if role == "assistant" and self._thought:
            turn["reasoning"] = self._thought
        self._thought = ""
        self.messages.append(turn)
        return turn

    def add_call(self, place: str, call_id: str, name: str, arguments: str) -> None:
        """A call, of the assistant's turn before it if there is one."""
        if call_id in self._calls:
            raise InvalidRequest(f"{place}.call_id: two calls have the id {call_id[:64]!r}.", f"{place}.call_id")
        self._calls.add(call_id)
        self._waiting[call_id] = place
        turn = self._assistants_turn()
        if turn is None:
            turn = self._begin_turn("assistant", "")
        function = {"name": name, "arguments": arguments}
        turn.setdefault("tool_calls", []).append({"id": call_id, "type": "function", "function": function})

    def add_result(self, place: str, call_id: str, text: str) -> None:
        """What a call has led to."""
        if self._waiting.pop(call_id, None) is None:
            why = "has its result already" if call_id in self._calls else "is not among the items before it"
            raise InvalidRequest(f"{place}.call_id: the call {call_id[:64]!r} {why}.", f"{place}.call_id")
        self.messages.append({"role": "tool", "tool_call_id": call_id, "content": text})
        self._thought = ""

    def check_answered(self) -> None:
        """Refuse a call that nobody answered."""
        for call_id, place in self._waiting.items():
            raise InvalidRequest(f"{place}: no item is the result of the call {call_id[:64]!r}; send one.", place)

    def _assistants_turn(self) -> dict[str, Any] | None:
        return self.messages[-1] if self.messages and self.messages[-1]["role"] == "assistant" else None


def _add(turns: _Turns, place: str, item: Any) -> None:
    if not isinstance(item, dict):
        raise InvalidRequest(f"{place}: must be an object.", place)
    kind = item.get("type")
    if kind is None:
        kind = "message" if "role" in item else "item_reference"
    if not isinstance(kind, str):
        raise InvalidRequest(f"{place}.type: must be a string.", f"{place}.type")
    if kind == "message":
        turns.add_message(*_message(place, item))
    elif kind == "reasoning":
        turns.add_thought(_thought(place, item))
    elif kind == "agent_message":
        turns.add_message("user", _text_of(f"{place}.content", item.get("content"), "user"))
    elif kind == "function_call":
        arguments = _text(place, item, "arguments")
        turns.add_call(place, _text(place, item, "call_id"), _name(place, item), arguments)
    elif kind == "custom_tool_call":
        arguments = encode_input(_text(place, item, "input"))
        turns.add_call(place, _text(place, item, "call_id"), _name(place, item), arguments)
    elif kind in CLIENT_CALLS:
        _add_client_call(turns, place, item, *CLIENT_CALLS[kind])
    elif kind in RESULTS:
        _add_result(turns, place, item, kind)
    elif kind in REFUSED_KINDS:
        raise refused(place, f"{place}: {kind!r} is not supported: {REFUSED_KINDS[kind]}.", "input")
    elif kind not in LEFT_OUT:
        raise refused(f"{place}.type", f"{place}.type: {kind[:64]!r} is no kind of item that is known here.", "input")


def _message(place: str, item: Mapping[str, Any]) -> tuple[str, str]:
    role, content = item.get("role"), item.get("content")
    if role not in ROLES:
        raise InvalidRequest(f"{place}.role: must be one of {', '.join(ROLES)}.", f"{place}.role")
    if content is None and role == "assistant":
        content = []
    return role, _text_of(f"{place}.content", content, role)


def _thought(place: str, item: Mapping[str, Any]) -> str:
    """The text of a thought; "" of one that another server has summed up or sealed."""
    parts = item.get("content") or []
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise InvalidRequest(f"{place}.content: must be a list of parts.", f"{place}.content")
    texts = [part.get("text") for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise InvalidRequest(f"{place}.content: each part must have a text.", f"{place}.content")
    return "".join(texts)


def _add_client_call(turns: _Turns, place: str, item: Mapping[str, Any], name: str, key: str) -> None:
    call_id = item.get("call_id")
    if call_id is None and item.get("type") == "tool_search_call":
        return  # run by the server that wrote it
    value = item.get(key)
    if not isinstance(value, dict | str):
        raise InvalidRequest(f"{place}.{key}: must be an object.", f"{place}.{key}")
    key = "id" if call_id is None else "call_id"  # of a local shell's, older clients send the one only
    turns.add_call(place, _text(place, item, key), name, value if isinstance(value, str) else _json(value))


def _add_result(turns: _Turns, place: str, item: Mapping[str, Any], kind: str) -> None:
    if kind == "tool_search_output":
        if item.get("call_id") is not None:
            turns.add_result(place, _text(place, item, "call_id"), _json(item.get("tools") or []))
        return
    # OpenAI's types have the call's id in `id` of a local shell's output; clients send it as `call_id`.
    key = "id" if kind == "local_shell_call_output" and item.get("call_id") is None else "call_id"
    output = item.get("output")
    if kind == "apply_patch_call_output" and output is None:
        output = item.get("status")
    if kind == "shell_call_output" and isinstance(output, list):
        output = _json(output)
    turns.add_result(place, _text(place, item, key), _text_of(f"{place}.output", output, "tool"))


def _text_of(place: str, content: Any, role: str) -> str:
    if not isinstance(content, str | list):
        raise InvalidRequest(f"{place}: must be a string or a list of parts.", place)
    if isinstance(content, list):
        check_parts(place, content, "input")
    return text_of_message({"role": role, "content": content})


def _text(place: str, item: Mapping[str, Any], key: str) -> str:
    value = item.get(key)
    if not isinstance(value, str):
        raise InvalidRequest(f"{place}.{key}: must be a string.", f"{place}.{key}")
    return value


def _name(place: str, item: Mapping[str, Any]) -> str:
    namespace = item.get("namespace")
    if namespace is not None and not isinstance(namespace, str):
        raise InvalidRequest(f"{place}.namespace: must be a string.", f"{place}.namespace")
    return flat_name(namespace, _text(place, item, "name"))


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
