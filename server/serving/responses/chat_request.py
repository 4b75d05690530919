"""A request for a response as a request for a chat completion, and the chat's words for its fields as the client's.

Knows fields, neither prompts nor answers.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openai.types.responses import ResponseTextConfig
from openai.types.responses.response import ToolChoice
from openai.types.responses.tool_choice_allowed import ToolChoiceAllowed
from openai.types.responses.tool_choice_custom import ToolChoiceCustom
from openai.types.responses.tool_choice_function import ToolChoiceFunction
from pydantic import ValidationError
from pydantic_core import to_json
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

from ultrafuser.server.errors import ApiError, InvalidRequest
from ultrafuser.server.requests.bodies import as_request_error
from ultrafuser.server.requests.mark_fields import MARK_FIELDS
from ultrafuser.server.requests.responses_request import SAMPLING_FIELDS, ResponsesRequest
from ultrafuser.server.requests.unsupported import refused
from ultrafuser.server.serving.responses.input_items import messages_of
from ultrafuser.server.serving.responses.toolbox import OfferedTool, Toolbox

LOGPROBS = "message.output_text.logprobs"
"""What a request includes to be told log probabilities."""

_NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}
"""The chat's names of fields, and the client's."""

_SCHEMA_FIELDS: Mapping[str, tuple[type, str, bool]] = {
    "name": (str, "a string", True),
    "schema": (dict, "an object", True),
    "description": (str, "a string", False),
    "strict": (bool, "true or false", False),
}
"""What a format has that is a schema; whether it has to."""


@dataclass(frozen=True)
class Asked:
    """What a client asks for, read once."""

    request: ResponsesRequest
    toolbox: Toolbox
    messages: list[dict[str, Any]]
    offered: tuple[OfferedTool, ...]
    """The tools in force that the choice allows."""
    chat_choice: str | dict[str, Any]
    choice: ToolChoice
    """As the response shows it."""
    text: ResponseTextConfig
    response_format: dict[str, Any] | None

    @classmethod
    def read(cls, request: ResponsesRequest) -> "Asked":
        """Read items, tools and formats.

        Raises:
            InvalidRequest: naming the place of what is wrong.
        """
        toolbox = Toolbox(request.tools or (), request.input)
        messages = messages_of(request.input, request.instructions)
        tools, chat_choice, choice = _choice(request.tool_choice, toolbox)
        text, response_format = _text_format(request.text or {})
        return cls(request, toolbox, messages, tools, chat_choice, choice, text, response_format)

    def chat(self, strict: Mapping[str, bool]) -> ChatCompletionRequest:
        """The chat completion that answers it, as a stream; `strict`: whether calls follow their function's parameters,
        where the client has not said.

        Raises:
            RequestValidationError: a field is out of its range, by the chat's name.
        """
        request = self.request
        extra = request.model_extra or {}
        fields: dict[str, Any] = {
            "messages": self.messages,
            "model": request.model,
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_completion_tokens": request.max_output_tokens,
            "response_format": self.response_format,
            "reasoning_effort": request.reasoning and request.reasoning.effort,
            **{name: getattr(request, name) for name in SAMPLING_FIELDS},
            **{name: extra.get(name) for name in MARK_FIELDS},
        }
        if LOGPROBS in (request.include or ()) or request.top_logprobs:
            fields |= {"logprobs": True, "top_logprobs": request.top_logprobs or 0}
        if self.offered:
            fields["tools"] = [tool.for_chat(strict.get(tool.flat, tool.strict)) for tool in self.offered]
            fields["tool_choice"] = self.chat_choice
        given = {name: value for name, value in fields.items() if value is not None}
        try:
            return ChatCompletionRequest.model_validate_json(to_json(given), strict=True)
        except ValidationError as error:
            raise as_request_error(error, ("body",)) from error

    def in_the_clients_words(self, error: ApiError) -> ApiError:
        """The chat's error about a field, about the one that the client wrote."""
        if (own := error.param) is not None:
            error.param = _clients_name(own, [tool.place for tool in self.offered])
            rest = error.message.removeprefix(own)
            if rest != error.message:
                error.message = error.param + rest
        error.message = error.message.replace("your messages resulted", "your input resulted")
        if error.param == "min_tokens":
            error.message = error.message.replace("to max_tokens", "to max_output_tokens")
        return error


def _clients_name(name: str, places: Sequence[str]) -> str:
    tool = re.fullmatch(r"tools[\[.](\d+)\]?(?:\.function)?(.*)", name)
    if tool and int(tool[1]) < len(places):
        return places[int(tool[1])] + tool[2]
    first, dot, rest = name.partition(".")
    return _NAMES.get(first, first) + dot + rest


def _choice(choice: Any, toolbox: Toolbox) -> tuple[tuple[OfferedTool, ...], str | dict[str, Any], ToolChoice]:
    """Tools that may be called, and the choice among them, for the chat and for the response."""
    tools = tuple(toolbox.tools)
    if choice is None or choice in ("auto", "none", "required"):
        return tools, *_mode("tool_choice", choice or "auto", tools)
    kind = choice.get("type") if isinstance(choice, dict) else None
    if kind in ("function", "custom"):
        tool = toolbox.named("tool_choice", choice)
        named = {"type": "function", "function": {"name": tool.flat}}
        echo = ToolChoiceFunction if tool.kind == "function" else ToolChoiceCustom
        return tools, named, echo(type=tool.kind, name=tool.name)  # type: ignore[arg-type]
    if kind == "allowed_tools":
        return _allowed(choice, toolbox)
    if isinstance(kind, str):
        instead = "only functions and custom tools can be demanded"
        raise refused("tool_choice", f"tool_choice: {kind[:64]!r} is not run here; {instead}.")
    raise InvalidRequest("tool_choice: must be auto, none, required or an object with a type.", "tool_choice")


def _mode(place: str, mode: Any, tools: Sequence[OfferedTool]) -> tuple[str, Any]:
    if mode == "required" and not tools:
        raise InvalidRequest(f"{place}: there is no function or custom tool that could be called.", place)
    return mode if tools else "none", mode


def _allowed(
    choice: Mapping[str, Any], toolbox: Toolbox
) -> tuple[tuple[OfferedTool, ...], str | dict[str, Any], ToolChoice]:
    mode: Any = choice.get("mode") or "auto"
    allowed = choice.get("tools")
    if mode not in ("auto", "required"):
        raise InvalidRequest("tool_choice.mode: must be auto or required.", "tool_choice.mode")
    if not isinstance(allowed, list) or not all(isinstance(item, dict) for item in allowed):
        raise InvalidRequest("tool_choice.tools: must be a list of objects.", "tool_choice.tools")
    own = [(index, item) for index, item in enumerate(allowed) if item.get("type") in ("function", "custom")]
    places = {toolbox.named(f"tool_choice.tools.{index}", item).place for index, item in own}
    tools = tuple(tool for tool in toolbox.tools if tool.place in places)
    shown = ToolChoiceAllowed(type="allowed_tools", mode=mode, tools=allowed)
    return tools, _mode("tool_choice", mode, tools)[0], shown


def _text_format(text: Mapping[str, Any]) -> tuple[ResponseTextConfig, dict[str, Any] | None]:
    """`text` as a response shows it, and the chat's `response_format`."""
    form = text.get("format") or {"type": "text"}
    kind = form.get("type") if isinstance(form, dict) else None
    verbosity = text.get("verbosity") or "medium"
    if verbosity not in ("low", "medium", "high"):
        raise InvalidRequest("text.verbosity: must be low, medium or high.", "text.verbosity")
    if kind not in ("text", "json_object", "json_schema"):
        raise InvalidRequest("text.format.type: must be text, json_object or json_schema.", "text.format.type")
    own = _named_schema(form) if kind == "json_schema" else {}
    shown = ResponseTextConfig.model_validate({"format": {"type": kind, **own}, "verbosity": verbosity})
    if kind == "json_schema":
        return shown, {"type": kind, "json_schema": own}
    return shown, {"type": kind} if kind == "json_object" else None


def _named_schema(form: Mapping[str, Any]) -> dict[str, Any]:
    """What a format of this kind says."""
    for key, (type_, must, is_needed) in _SCHEMA_FIELDS.items():
        if form.get(key) is None and not is_needed:
            continue
        if not isinstance(form.get(key), type_):
            raise InvalidRequest(f"text.format.{key}: must be {must}.", f"text.format.{key}")
    return {key: form[key] for key in _SCHEMA_FIELDS if form.get(key) is not None}
