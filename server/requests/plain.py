"""A body in the one form that the request models read: no nulls, and messages whose content is one string.

`null` is the same as leaving a field out, on every route; of vLLM's models each field has its own opinion. Its models
of messages would lose a refusal to another branch of a union, and look at a content's parts only while they are read.
Knows JSON values, no models.
"""

from typing import Any

from ultrafuser.gating.templates import (
    REASONING_FIELDS,
    TEXT_PARTS,
    TemplateError,
    reasoning_of,
    text_of_message,
    text_of_part,
)
from ultrafuser.server.errors import InvalidRequest
from ultrafuser.server.requests.unsupported import refused

_UNREADABLE = {"audio": "send what was said as content", "function_call": "send tool_calls"}
"""Fields of an assistant's turn that would be lost, and what to send instead."""


def without_nulls(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields that are not null."""
    return {name: value for name, value in fields.items() if value is not None}


def plain_body(body: dict[str, Any]) -> dict[str, Any]:
    """The fields that are not null; what is wrong with their types is left to the request models.

    Raises:
        UnsupportedParameter, InvalidRequest: a message has something else than text; names it.
    """
    plain = without_nulls(body)
    if isinstance(messages := plain.get("messages"), list):
        plain["messages"] = [
            _plain_message(f"messages.{index}", message) if isinstance(message, dict) else message
            for index, message in enumerate(messages)
        ]
    return plain


def _plain_message(place: str, message: dict[str, Any]) -> dict[str, Any]:
    plain = without_nulls(message)
    is_assistant = message.get("role") == "assistant"
    if is_assistant:
        _check_assistant(place, plain)
    content = (plain if is_assistant else message).get("content", "")
    if not isinstance(content, str | list):
        raise InvalidRequest(f"{place}.content: must be a string or a list of parts.", f"{place}.content")
    if isinstance(content, list):
        check_parts(f"{place}.content", content, "messages")
    plain["content"] = text_of_message(plain)
    if is_assistant:
        plain.pop("refusal", None)  # it is in the content now
        try:
            reasoning = reasoning_of(plain)
        except TemplateError as error:
            raise InvalidRequest(f"{place}: {error}", f"{place}.reasoning") from error
        plain.pop("reasoning_content", None)  # vLLM's models know the newer name only
        if reasoning is not None:
            plain["reasoning"] = reasoning
    return plain


def _check_assistant(place: str, message: dict[str, Any]) -> None:
    for name, instead in _UNREADABLE.items():
        if name in message:
            param = f"{place}.{name}"
            raise refused(param, f"{param} is not supported by a fused model: {instead}.", "messages")
    for name in ("refusal", *REASONING_FIELDS):
        if not isinstance(message.get(name, ""), str):
            raise InvalidRequest(f"{place}.{name}: must be a string.", f"{place}.{name}")


def check_parts(place: str, parts: list[Any], label: str) -> None:
    """Look at the parts of a content, which stands at this place of a body; a refusal is counted under the label.

    Raises:
        UnsupportedParameter, InvalidRequest: one is no text; names it.
    """
    for position, part in enumerate(parts):
        if text_of_part(part) is not None:
            continue
        if not isinstance(part, dict):
            raise InvalidRequest(f"{place}: each part must be an object or a string.", place)
        kind, param = part.get("type"), f"{place}.{position}"
        if isinstance(kind, str) and kind in TEXT_PARTS:
            key = f"{param}.{TEXT_PARTS[kind]}"
            raise InvalidRequest(f"{key}: must be a string.", key)
        raise refused(param, f"{param}: {kind!r} is not fused; send text.", label)
