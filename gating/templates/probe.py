"""What a chat template can show, found out by rendering made-up messages through it. Knows nothing of real ones."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ultrafuser.gating.templates.load import TemplateError

_USER = {"role": "user", "content": "USER-PROBE"}
_REPLY = {"role": "assistant", "content": "REPLY-PROBE"}
_SYSTEM = {"role": "system", "content": "SYSTEM-PROBE"}
_TOOL = {"name": "tool_probe", "description": "PURPOSE-PROBE", "parameters": {"type": "object", "properties": {}}}
_CALL = {"name": "tool_probe", "arguments": {"key_probe": "VALUE-PROBE"}}
_TOOL_USE: list[dict[str, Any]] = [
    _USER,
    {"role": "assistant", "content": "", "tool_calls": [{"id": "probe0000", "type": "function", "function": _CALL}]},
    {"role": "tool", "tool_call_id": "probe0000", "name": "tool_probe", "content": "RESULT-PROBE"},
    _REPLY,
    _USER,
]


@dataclass(frozen=True)
class Capabilities:
    """What a template shows by itself."""

    system: bool
    """A system message at the start."""

    late_system: bool
    """A system message between turns."""

    tools: bool
    """All of: the list of tools, calls with their arguments, and results."""


@lru_cache(maxsize=64)
def capabilities(chat_template: str) -> Capabilities:
    """What this template shows.

    Raises:
        TemplateError: not Jinja, or it fails on, or hides, plain user and assistant turns.
    """
    signs = {"USER-PROBE", "REPLY-PROBE"}
    try:
        if not signs <= _visible(chat_template, [_USER, _REPLY, _USER], signs):
            raise TemplateError("chat_template: shows no user or assistant turns; correct the template")
    except _failures() as error:
        reason = " ".join(str(error).split())
        raise TemplateError(f"chat_template: fails on a plain conversation ({reason}); correct it") from error
    tool_signs = {"PURPOSE-PROBE", "key_probe", "VALUE-PROBE", "RESULT-PROBE"}
    return Capabilities(
        system=_shows(chat_template, [_SYSTEM, _USER], {"SYSTEM-PROBE", "USER-PROBE"}),
        late_system=_shows(chat_template, [_USER, _REPLY, _SYSTEM, _USER], {"SYSTEM-PROBE"}),
        tools=_shows(chat_template, _TOOL_USE, tool_signs, tools=[{"type": "function", "function": _TOOL}]),
    )


def _shows(chat_template: str, messages: list[Any], signs: set[str], tools: list[Any] | None = None) -> bool:
    try:
        return signs <= _visible(chat_template, messages, signs, tools)
    except _failures():
        return False


def _failures() -> tuple[type[Exception], ...]:
    """The ways in which a template fails on what it was not written for: its own complaints, and any misuse of data."""
    from jinja2 import TemplateError as JinjaError

    return JinjaError, TypeError, AttributeError, LookupError


def _visible(chat_template: str, messages: list[Any], signs: set[str], tools: list[Any] | None = None) -> set[str]:
    # Imported late: transformers takes a second that a command line's --help should not.
    from transformers.utils.chat_template_utils import render_jinja_template

    special_tokens: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    rendered = render_jinja_template([messages], tools=tools, chat_template=chat_template, **special_tokens)[0]
    return {sign for sign in signs if sign in rendered[0]}
