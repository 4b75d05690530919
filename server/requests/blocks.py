"""Anthropic's content blocks, brought into the one form that is read: text, calls of tools and their results.

What must not be lost is refused by its place; what only speaks to Anthropic's own servers (marks of their cache, their
thoughts, their tools) is left out. The result is a body of the same API, in which each text is one string. Knows JSON
values, no models.
"""

from collections.abc import Iterator
from typing import Any

from ultrafuser.server.errors import InvalidRequest
from ultrafuser.server.requests.plain import without_nulls
from ultrafuser.server.requests.unsupported import refused

BILLING_HEADER = "x-anthropic-billing-header"
"""Begins a line that Claude Code puts before its system text, and that is another one in each request: rendered, no
prompt would begin as an earlier one did, and nothing be found in the prefix cache."""

UNOFFERED: dict[str, Any] = {"name": "", "input_schema": {}}
"""Stands for a tool that has no schema to be shown, so that those after it keep their numbers."""

_ROLES = ("user", "assistant", "system")
_TEXT_KEYS = {"text": "text", "tool_reference": "tool_name"}
_MIN_BUDGET = 1024


def plain_messages(body: dict[str, Any]) -> dict[str, Any]:
    """The fields that are not null, with text in the place of blocks of text; types are left to the request models.

    Raises:
        UnsupportedParameter, InvalidRequest: a block cannot be read, or a call and its result do not belong together;
            names its place.
    """
    plain = without_nulls(body)
    if "system" in plain:
        plain["system"] = _system_text("system", plain["system"])
    if "messages" in plain:
        if not isinstance(plain["messages"], list) or not plain["messages"]:
            raise InvalidRequest("messages: must be a list of at least one message.", "messages")
        plain["messages"] = list(_plain_turns(plain["messages"]))
    if isinstance(plain.get("tools"), list):
        plain["tools"] = [_plain_tool(f"tools.{index}", tool) for index, tool in enumerate(plain["tools"])]
    _check_thinking(plain.get("thinking"), plain.get("max_tokens"))
    return plain


def _plain_turns(messages: list[Any]) -> Iterator[dict[str, Any]]:
    calls = _OpenCalls()
    for index, message in enumerate(messages):
        place = f"messages.{index}"
        if not isinstance(message, dict):
            raise InvalidRequest(f"{place}: must be an object.", place)
        if (role := message.get("role")) not in _ROLES:
            raise InvalidRequest(f"{place}.role: must be user, assistant or system, got {role!r:.40}.", f"{place}.role")
        content = message.get("content")
        if role == "system":
            yield {"role": role, "content": _system_text(f"{place}.content", content)}
        else:
            yield {"role": role, "content": _plain_content(place, role, content, calls)}
    calls.check_answered()


def _plain_content(place: str, role: str, content: Any, calls: "_OpenCalls") -> str | list[dict[str, Any]]:
    """One text; a list where there are calls, or results, which come first."""
    calls.begin_turn(role)
    texts, thoughts, tools = [], [], []
    for at, block in _blocks(f"{place}.content", content):
        kind = block["type"]
        if kind == "text":
            calls.check_text(role)
            texts.append(_string(at, block, "text"))
        elif kind == "tool_use" and role == "assistant":
            tools.append(_plain_call(at, block, calls))
        elif kind == "tool_result" and role == "user":
            tools.append(_plain_result(at, block, calls))
        elif kind == "thinking" and role == "assistant":
            thoughts.append(_string(at, block, "thinking"))
        elif not (kind == "redacted_thinking" and role == "assistant"):
            raise _unread(at, kind, f"in a turn of the {role}")
    text, thought = "\n".join(texts), "".join(thoughts)
    if not tools:
        calls.check_text(role)
    if not tools and not thought:
        return text
    shown = [{"type": "thinking", "thinking": thought}] if thought else []
    shown += [{"type": "text", "text": text}] if text else []
    return [*tools, *shown] if role == "user" else [*shown, *tools]


def _plain_call(place: str, block: dict[str, Any], calls: "_OpenCalls") -> dict[str, Any]:
    own = {name: _string(place, block, name) for name in ("id", "name")}
    if not isinstance(arguments := block.get("input"), dict):
        raise InvalidRequest(f"{place}.input: must be an object.", f"{place}.input")
    calls.add(place, own["id"])
    return {"type": "tool_use", **own, "input": arguments}


def _plain_result(place: str, block: dict[str, Any], calls: "_OpenCalls") -> dict[str, Any]:
    call = _string(place, block, "tool_use_id")
    calls.answer(place, call)
    content = block.get("content")
    text = "" if content is None else "\n".join(_texts(f"{place}.content", content))
    if block.get("is_error") is True:
        text = f"Error: {text}"
    return {"type": "tool_result", "tool_use_id": call, "content": text}


class _OpenCalls:
    """The calls of the assistant's last turn that have no result yet, by their ids, and where they stand."""

    def __init__(self) -> None:
        self._open: dict[str, str] = {}
        self._answers = False

    def begin_turn(self, role: str) -> None:
        """Another turn; several turns of one role are one."""
        if role == "assistant" and self._answers:
            self.check_answered()
        self._answers = role == "user"

    def add(self, place: str, call: str) -> None:
        """A call is made."""
        if call in self._open:
            raise InvalidRequest(f"{place}.id: {call!r:.80} is the id of another call, too.", f"{place}.id")
        self._open[call] = place

    def answer(self, place: str, call: str) -> None:
        """A result."""
        if self._open.pop(call, None) is None:
            found = f"there is no tool_use {call!r:.80} in the turn before"
            raise InvalidRequest(f"{place}.tool_use_id: {found}.", f"{place}.tool_use_id")

    def check_text(self, role: str) -> None:
        """The user says something, which must not stand between a call and its result."""
        if role == "user":
            self.check_answered()

    def check_answered(self) -> None:
        """Raises InvalidRequest: a call has no result."""
        if self._open:
            call, place = next(iter(self._open.items()))
            needed = "begin the user's next turn with its tool_result"
            raise InvalidRequest(f"{place}: the tool_use {call!r:.80} has no result; {needed}.", place)


def _blocks(place: str, content: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """The blocks of a content, a string being one, and the place of each."""
    if isinstance(content, str):
        yield place, {"type": "text", "text": content}
        return
    if not isinstance(content, list):
        raise InvalidRequest(f"{place}: must be a string or a list of blocks.", place)
    for index, block in enumerate(content):
        at = f"{place}.{index}"
        if not isinstance(block, dict) or not isinstance(block.get("type"), str):
            raise InvalidRequest(f"{at}: must be an object with a type.", at)
        yield at, block


def _texts(place: str, content: Any) -> Iterator[str]:
    """The texts of a content that is nothing else; of a tool that is referred to, its name."""
    for at, block in _blocks(place, content):
        key = _TEXT_KEYS.get(block["type"])
        if key is None:
            raise _unread(at, block["type"], "here")
        yield _string(at, block, key)


def _system_text(place: str, content: Any) -> str:
    texts = _texts(place, content)
    kept = (text.partition("\n")[2] if text.startswith(BILLING_HEADER) else text for text in texts)
    return "\n".join(filter(None, kept))


def _string(place: str, block: dict[str, Any], key: str) -> str:
    if not isinstance(text := block.get(key), str):
        raise InvalidRequest(f"{place}.{key}: must be a string.", f"{place}.{key}")
    return text


def _unread(place: str, kind: str, where: str) -> InvalidRequest:
    return refused(
        place, f"{place}: a block of the type {kind!r:.40} cannot be read {where}; send text.", place.partition(".")[0]
    )


def _plain_tool(place: str, tool: Any) -> dict[str, Any]:
    """A tool's name, description and schema; a tool that Anthropic's servers or models know by its type has none."""
    if not isinstance(tool, dict):
        raise InvalidRequest(f"{place}: must be an object.", place)
    if tool.get("type") not in (None, "custom") and "input_schema" not in tool:
        return UNOFFERED
    if not _string(place, tool, "name"):
        raise InvalidRequest(f"{place}.name: is empty.", f"{place}.name")
    return {
        name: tool[name] for name in ("name", "description", "input_schema", "strict") if tool.get(name) is not None
    }


def _check_thinking(thinking: Any, max_tokens: Any) -> None:
    """Its kinds are a union, whose errors would name its branches."""
    if not isinstance(thinking, dict) or thinking.get("type") != "enabled":
        return
    budget, param = thinking.get("budget_tokens"), "thinking.budget_tokens"
    if type(budget) is not int or budget < _MIN_BUDGET:
        raise InvalidRequest(f"{param}: must be a whole number of at least {_MIN_BUDGET}.", param)
    if type(max_tokens) is int and budget >= max_tokens:
        raise InvalidRequest(f"{param}: must be less than max_tokens, {max_tokens}, got {budget}.", param)
