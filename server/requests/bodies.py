"""Request bodies: read up to a cap, parsed as strict JSON and validated without coercion, before FastAPI sees them.

FastAPI alone would read any length, and take "0" for 0, true for 1 and the last of two equal keys. Knows no routes.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jiter
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_json
from starlette.requests import ClientDisconnect
from vllm.renderers.chat_utils import ChatCompletionMessageParam

from ultrafuser.server.errors import BodyTooLarge, InvalidRequest, UnsupportedMediaType
from ultrafuser.server.requests.plain import plain_body, without_nulls
from ultrafuser.server.settings import Limits

MAX_DEPTH = 200
"""How deeply a body may nest: the parser's own limit, far below Python's."""


@dataclass(frozen=True)
class BodyForm:
    """What is known of a route's bodies before their model reads them."""

    token_id_fields: frozenset[str] = frozenset()
    """Fields whose arrays of integers may be as long as a prompt or a vocabulary."""

    wide_fields: frozenset[str] = frozenset()
    """Fields that hold a list of objects, or a schema: each of their items may have values of its own."""

    plain: Callable[[dict[str, Any]], dict[str, Any]] = without_nulls
    """Brings a body into the form that the model reads; raises InvalidRequest."""


_VALUES_PER_ITEM = 16
"""How many values a wide field may have altogether, for each item that one array or object may have."""

_MESSAGE: TypeAdapter[Any] = TypeAdapter(ChatCompletionMessageParam)
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
"""Each byte is looked at once: possessive, and a string without an end is one, too."""
_INTEGERS = range(-(2**63), 2**64)
"""What can be sent to the engine."""


async def read_request(request: Request, adapter: TypeAdapter[Any], form: BodyForm, limits: Limits) -> Request:
    """The request with its body at hand, as bytes and as what the adapter makes of it.

    Raises:
        UnsupportedMediaType, BodyTooLarge, InvalidRequest, RequestValidationError: the body is none of this API.
    """
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise UnsupportedMediaType("Content-Type: send the body as application/json.")
    body = await read_body(request, limits.max_body_bytes)
    value = parse_json(body, limits.max_items)
    check_shape(value, form, limits.max_items)
    plain = form.plain(value)
    try:
        return _ReadRequest(request, body, adapter.validate_json(to_json(plain), strict=True))
    except ValidationError as error:
        raise as_request_error(error, ("body",)) from error


class _ReadRequest(Request):
    """What FastAPI asks for the body, and gets what was read already."""

    def __init__(self, request: Request, body: bytes, value: Any) -> None:
        super().__init__(request.scope, request.receive)
        self._read, self._value = body, value

    async def body(self) -> bytes:
        return self._read

    async def json(self) -> Any:
        return self._value


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The body; reading stops at the cap, whatever the length that was declared.

    Raises:
        BodyTooLarge: it is longer than the cap, or says so.
        InvalidRequest: the client left before its end.
    """
    too_large = BodyTooLarge(f"The body is longer than {max_bytes} bytes, the most that this server reads.")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and (len(declared) > len(str(max_bytes)) or int(declared) > max_bytes):
        raise too_large
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > max_bytes:
                raise too_large
    except ClientDisconnect as error:
        raise InvalidRequest("The client left before its body was complete.") from error
    return bytes(body)


def parse_json(body: bytes, max_items: int) -> Any:
    """The JSON value; of two equal keys neither wins.

    Raises:
        InvalidRequest: not JSON in UTF-8 (NaN, infinities and lone surrogates are not), nested deeper than `MAX_DEPTH`,
            a number of more than 4,300 digits, a key that occurs twice in one object, or a great many containers.
    """
    most = _VALUES_PER_ITEM * max_items
    if _count_openings(body) > most and _count_openings(_STRING.sub(b"", body)) > most:
        raise InvalidRequest("The body has too many arrays and objects; send less.")
    try:
        return jiter.from_json(body, allow_inf_nan=False, catch_duplicate_keys=True, cache_mode="none")
    except ValueError as error:
        raise InvalidRequest(f"The body is not JSON: {error}.") from error


def check_shape(value: Any, form: BodyForm, max_items: int) -> None:
    """Bound the number of values before they are validated, which would report each wrong one: that takes minutes.

    Raises:
        InvalidRequest: no object; an array or object with more than `max_items` entries, token ids apart; too many
            values altogether; or an integer beyond 64 bits. Names the field of the body.
    """
    if not isinstance(value, dict):
        raise InvalidRequest("The body must be a JSON object.")
    _check_count(value, max_items, None)
    for name, field in value.items():
        if not (name in form.token_id_fields and _is_token_ids(field)):
            _check_field(name, field, max_items, 1 + max_items * (_VALUES_PER_ITEM if name in form.wide_fields else 1))


def _check_field(name: str, value: Any, max_items: int, budget: int) -> None:
    pending: list[Any] = [[value]]  # a number by itself is looked at, too
    while pending:
        container = pending.pop()
        _check_count(container, max_items, name)
        budget -= len(container)
        if budget < 0:
            raise InvalidRequest(f"{name}: has too many values; send less.", name)
        inner = list(container.values()) if isinstance(container, dict) else container
        if any(type(item) is int and item not in _INTEGERS for item in inner):
            raise InvalidRequest(f"{name}: an integer of more than 64 bits.", name)
        containers = (item for item in inner if isinstance(item, dict | list))
        pending += [item for item in containers if not (name == "prompt" and _is_token_ids(item))]


def _check_count(container: Mapping[str, Any] | list[Any], max_items: int, field: str | None) -> None:
    if len(container) > max_items:
        place = field or "body"
        raise InvalidRequest(f"{place}: {len(container)} entries in one array or object, at most {max_items}.", field)


def _count_openings(text: bytes) -> int:
    return text.count(b"[") + text.count(b"{")


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _plain_openai(body: dict[str, Any]) -> dict[str, Any]:
    """Look at one message after the other, up to the first wrong one: each has an error for every role there is."""
    plain = plain_body(body)
    messages = plain.get("messages")
    for index, message in enumerate(messages if isinstance(messages, list) else ()):
        place: tuple[str | int, ...] = ("body", "messages", index)
        try:
            checked = _MESSAGE.validate_python(message, strict=True)
        except ValidationError as error:
            raise as_request_error(error, place) from error
        try:
            list(checked.get("tool_calls") or ())  # validated while it is read
        except ValidationError as error:
            raise as_request_error(error, (*place, "tool_calls")) from error
    return plain


OPENAI_FORM = BodyForm(
    token_id_fields=frozenset({"prompt", "allowed_token_ids", "tokens"}),
    wide_fields=frozenset({"messages", "tools", "response_format", "structured_outputs", "chat_template_kwargs"}),
    plain=_plain_openai,
)
"""Bodies of chat and raw completions, and of the routes beside them."""


def as_request_error(error: ValidationError, place: tuple[str | int, ...]) -> RequestValidationError:
    """FastAPI's error for what a model has found wrong at this place of a body."""
    errors = error.errors(include_url=False, include_input=False)
    return RequestValidationError([{**each, "loc": (*place, *each["loc"])} for each in errors])
