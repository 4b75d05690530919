"""The one rule by which every specialist reads the same content, whatever its chat template can express.

The rule. A template is asked, with made-up messages, what it shows. What it shows is passed through; the rest becomes
text, so that nothing is lost:
  - a system message it cannot show (a leading one, or one in the middle) goes to the start of the first user turn;
  - tools are shown wholly (list, calls and results) or not at all. If not, the list follows the system text in the
    first user turn, calls become text in the assistant's turn and results become a user turn, in the Hermes notation
    <tool_call>...</tool_call>, <tool_response>...</tool_response>.
  - arguments that are no JSON object (a call that was cut off, say) have no place in any template: all calls of their
    turn, and its results, become text in the same notation, the arguments as they stand.
An assistant's earlier reasoning is handed to every template, which shows it or leaves it out, by its own rule.
Content is always one string, and user turns that only folding has put side by side become one, so that a template
which insists on alternating turns still works.

Serving and training both use it. It does not know tokens, specialists or HTTP.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jiter

from ultrafuser.gating.templates.content import reasoning_of, text_of_message
from ultrafuser.gating.templates.load import TemplateError
from ultrafuser.gating.templates.probe import Capabilities, capabilities

Message = dict[str, Any]

_TOOLS_INTRODUCTION = "You can call these tools, each described by a JSON schema:"
_TOOLS_INSTRUCTION = (
    "To call a tool, write nothing but"
    ' <tool_call>{"name": "TOOL", "arguments": {"ARGUMENT": "VALUE"}}</tool_call>, once per call.'
)


def fold_messages(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None, chat_template: str
) -> tuple[list[Message], list[dict[str, Any]] | None]:
    """Messages and tools in a form that this template shows completely.

    Args:
        messages: OpenAI chat messages; content is text, a list of text parts, or absent; an assistant's may be a
            refusal, which is text, too. They are not changed.
        tools: OpenAI tools, or None.
        chat_template: Jinja text.

    Returns:
        What to hand to `apply_chat_template` as `conversation` and `tools`.

    Raises:
        TemplateError: no messages, an unknown role, content other than text, or a template that shows no user turn.
    """
    if not messages:
        raise TemplateError("messages: empty; send at least one message")
    can_show = capabilities(chat_template)
    original = _merge_leading_system([_plain(message) for message in messages])
    kept, texts = _take_system(original, can_show)
    without_form = _with_malformed_calls(original) if can_show.tools else range(len(original))
    kept = [(index, _tools_to_text(turn) if index in without_form else turn) for index, turn in kept]
    if tools and not can_show.tools:
        texts.append(_describe(tools))
    turns = _prepend(_join_user_turns(kept, original), "\n\n".join(texts))
    return turns, [dict(tool) for tool in tools] if tools and can_show.tools else None


def _plain(message: Mapping[str, Any]) -> Message:
    """The message with one string as content, tool arguments as objects, and `developer` as `system`."""
    role = "system" if message.get("role") == "developer" else message.get("role")
    if role not in ("system", "user", "assistant", "tool"):
        raise TemplateError(f"messages: unknown role {role!r}; use system, developer, user, assistant or tool")
    plain: Message = {"role": role, "content": text_of_message(message)}
    if role == "assistant" and message.get("tool_calls"):
        plain["tool_calls"] = [_plain_call(call) for call in message["tool_calls"]]
    if role == "assistant" and (reasoning := reasoning_of(message)):
        # Templates know it by one of two names; those that know neither leave it out.
        plain |= {"reasoning": reasoning, "reasoning_content": reasoning}
    return plain | {key: message[key] for key in ("name", "tool_call_id") if message.get(key) is not None}


def _plain_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        kind = call.get("type")
        raise TemplateError(f"messages: a tool call of type {kind!r} has no function; send calls of type 'function'")
    return {**call, "function": {**function, "arguments": _arguments(function.get("arguments"))}}


def _arguments(arguments: Any) -> Any:
    """The object that a call's arguments are; a text that is none by the rules of a request's body stays as it is."""
    if not isinstance(arguments, str):
        return arguments or {}
    try:
        value = jiter.from_json((arguments or "{}").encode(), allow_inf_nan=False, catch_duplicate_keys=True)
        json.dumps(value, allow_nan=False)  # 1e999 is read as infinity
    except ValueError:
        return arguments
    return value if isinstance(value, dict) else arguments


def _with_malformed_calls(turns: Sequence[Message]) -> set[int]:
    """Indices of the turns with a call whose arguments are no object, and of the results that follow them."""
    found: set[int] = set()
    for index, turn in enumerate(turns):
        is_result = turn["role"] == "tool" and index - 1 in found
        if is_result or any(isinstance(call["function"]["arguments"], str) for call in turn.get("tool_calls", ())):
            found.add(index)
    return found


def _merge_leading_system(turns: list[Message]) -> list[Message]:
    """Several system messages at the start become one: many templates look at the first message only."""
    leading = []
    while turns and turns[0]["role"] == "system":
        leading.append(turns[0]["content"])
        turns = turns[1:]
    return [{"role": "system", "content": "\n\n".join(leading)}, *turns] if leading else turns


def _take_system(turns: list[Message], can_show: Capabilities) -> tuple[list[tuple[int, Message]], list[str]]:
    """The turns that stay, with their index, and the texts of the system messages that cannot."""
    kept: list[tuple[int, Message]] = []
    texts: list[str] = []
    for index, turn in enumerate(turns):
        shown = can_show.system if index == 0 else can_show.late_system
        if turn["role"] == "system" and not shown:
            texts.append(turn["content"])
        else:
            kept.append((index, turn))
    return kept, texts


def _tools_to_text(turn: Message) -> Message:
    if turn["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{turn['content']}\n</tool_response>"}
    if turn.get("tool_calls"):
        calls = [f"<tool_call>\n{_call_text(call['function'])}\n</tool_call>" for call in turn["tool_calls"]]
        return {"role": turn["role"], "content": "\n".join(filter(None, [turn["content"], *calls]))}
    return turn


def _join_user_turns(numbered: list[tuple[int, Message]], original: list[Message]) -> list[Message]:
    joined: list[Message] = []
    before = -1
    for index, turn in numbered:
        if joined and turn["role"] == joined[-1]["role"] == "user":
            sent_so = before == index - 1 and original[before]["role"] == original[index]["role"] == "user"
            if not sent_so:
                previous = joined.pop()
                turn = {**previous, "content": f"{previous['content']}\n\n{turn['content']}"}
        joined.append(turn)
        before = index
    return joined


def _call_text(function: Mapping[str, Any]) -> str:
    arguments = function["arguments"]
    text = arguments if isinstance(arguments, str) else _json(arguments)
    return f'{{"name": {_json(function["name"])}, "arguments": {text}}}'


def _describe(tools: Sequence[Mapping[str, Any]]) -> str:
    lines = [_json(tool) for tool in tools]
    return "\n".join([_TOOLS_INTRODUCTION, "<tools>", *lines, "</tools>", _TOOLS_INSTRUCTION])


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _prepend(turns: list[Message], text: str) -> list[Message]:
    if not text:
        return turns
    for index, turn in enumerate(turns):
        if turn["role"] == "user":
            joined = {**turn, "content": f"{text}\n\n{turn['content']}"}
            return [*turns[:index], joined, *turns[index + 1 :]]
    position = 1 if turns and turns[0]["role"] == "system" else 0
    return [*turns[:position], {"role": "user", "content": text}, *turns[position:]]
