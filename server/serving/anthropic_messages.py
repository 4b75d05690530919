"""vLLM's chat completions as Anthropic's API: a conversation goes in, a message or its events come out.

A request of /v1/messages becomes a chat request by vLLM's own conversion, and then is one: what is checked, rendered,
salted and constrained there is so here. Errors name its fields as its client wrote them. Knows no routes.
"""

import re
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import replace
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import PrivateAttr, ValidationError
from vllm.config import ModelConfig
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest, ChatCompletionResponse
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.renderers import TokenizeParams

from ultrafuser.server.errors import ApiError
from ultrafuser.server.requests.anthropic_bodies import CountTokensRequest, MessagesRequest
from ultrafuser.server.requests.checks import check_request
from ultrafuser.server.requests.limits import RequestBounds
from ultrafuser.server.requests.mark_fields import GATE_WEIGHTS, MARK_FIELDS, asked_marks
from ultrafuser.server.requests.plain import without_nulls
from ultrafuser.server.serving.message_answers import Message, TokenCount, message
from ultrafuser.server.serving.message_events import MessageEvents
from ultrafuser.server.serving.translation import as_api_error, error_in

_AS_WRITTEN = (
    (re.compile(r"^max_completion_tokens$"), "max_tokens"),
    (re.compile(r"^stop\b"), "stop_sequences"),
    (re.compile(r"^response_format.*"), "output_config.format.schema"),
    (re.compile(r"^reasoning_effort$"), "output_config.effort"),
    (re.compile(r"^tools[.\[](\d+)\]?\.function\.parameters"), r"tools.\1.input_schema"),
    (re.compile(r"^tools\.(\d+)\.function"), r"tools.\1"),
)
"""Fields of a chat request, and what they are in a request of this API."""


class Conversation(ChatCompletionRequest):
    """A chat request that was one of /v1/messages, or is only to be measured."""

    _asked_tokens: int = PrivateAttr(0)  # `max_tokens` as it was sent
    _prompt_tokens: int = PrivateAttr(0)
    _tool_places: list[int] = PrivateAttr(default_factory=list)  # the client's numbers of the tools
    _is_measured: bool = PrivateAttr(False)

    def build_tok_params(self, model_config: ModelConfig) -> TokenizeParams:
        """How the prompt becomes tokens; one that is only measured may be longer than the context."""
        params = super().build_tok_params(model_config)
        return replace(params, max_total_tokens=None) if self._is_measured else params


class AsMessages(OpenAIServingChat):
    """Put before a class of chat completions: they in Anthropic's words."""

    bounds: RequestBounds
    specialists: Sequence[str]

    async def create_messages(
        self, request: MessagesRequest, raw_request: Request
    ) -> AsyncGenerator[str, None] | Message:
        """The answer, or its events.

        Raises:
            ApiError: naming the field as this API does.
        """
        chat = self._conversation(request)
        with _named_as_written(chat._tool_places):
            answer = await self.create_chat_completion(chat, raw_request)
            if (error := error_in(answer)) is not None:
                raise error
        assert not isinstance(answer, ErrorResponse)
        return message(answer, chat._asked_tokens) if isinstance(answer, ChatCompletionResponse) else answer

    async def count_tokens(self, request: CountTokensRequest) -> TokenCount:
        """The length of the prompt that a conversation becomes, however long.

        Raises:
            ApiError: as above.
        """
        chat = self._conversation(request)
        chat._is_measured = True
        with _named_as_written(chat._tool_places):
            answer = await OpenAIServingChat.render_chat_request(self, chat)  # constraints take no part in it
            if (error := error_in(answer)) is not None:
                raise error
        return TokenCount(input_tokens=_length(answer))

    async def render_chat_request(self, request: ChatCompletionRequest) -> Any:
        rendered = await super().render_chat_request(request)
        if not isinstance(rendered, ErrorResponse) and isinstance(request, Conversation):
            request._prompt_tokens = _length(rendered)
        return rendered

    def chat_completion_stream_generator(
        self,
        request: ChatCompletionRequest,
        result_generator: Any,
        request_id: str,
        model_name: str,
        *args: Any,
        **kwargs: Any,
    ) -> AsyncGenerator[str, None]:
        assert isinstance(request, Conversation)
        events = MessageEvents(request_id, model_name, request._prompt_tokens, request._asked_tokens)
        watched = events.watch(result_generator)
        chunks = super().chat_completion_stream_generator(request, watched, request_id, model_name, *args, **kwargs)
        head = {"specialists": list(self.specialists)} if GATE_WEIGHTS in asked_marks(request) else {}
        return _raising_as_written(events.of(chunks, **head), request._tool_places)

    def _conversation(self, request: MessagesRequest | CountTokensRequest) -> Conversation:
        places = [place for place, tool in enumerate(request.tools or ()) if tool.name]
        with _named_as_written(places):
            chat = _validated(request)
            if not self.bounds.tells_thoughts:  # clients ask for a budget of any model
                chat.thinking_token_budget = None
            chat._tool_places = places
            chat._asked_tokens = getattr(request, "max_tokens", 0)
            check_request(chat, self.bounds)
        return chat


def _chat_fields(request: MessagesRequest | CountTokensRequest) -> dict[str, Any]:
    """The fields of the chat request that this one is."""
    converted = AnthropicServingMessages.to_chat_completion_request(request)
    fields = without_nulls(converted.model_dump(by_alias=True, exclude_unset=True))
    functions = [without_nulls(tool["function"]) for tool in fields.pop("tools", ())]
    if offered := [{"type": "function", "function": function} for function in functions if function["name"]]:
        fields["tools"] = offered
    elif fields.get("tool_choice") == "auto":
        del fields["tool_choice"]
    if request.thinking is not None:
        fields["thinking"] = {"type": request.thinking.type}
        if request.thinking.type == "disabled":
            fields.pop("reasoning_effort", None)  # vLLM's way to say it
    if any(turn["role"] == "assistant" and turn.get("content") for turn in fields["messages"][-1:]):
        fields |= {"continue_final_message": True, "add_generation_prompt": False}
    if fields.get("stream"):
        fields["stream_options"] = {"include_usage": True}
    return fields | {name: value for name, value in (request.model_extra or {}).items() if name in MARK_FIELDS}


def _validated(request: MessagesRequest | CountTokensRequest) -> Conversation:
    """The chat request; vLLM sets some fields past the checks of its model, which looks at them all here."""
    try:
        return Conversation.model_validate(_chat_fields(request))
    except ValidationError as error:
        errors = error.errors(include_url=False, include_input=False)
        raise RequestValidationError([{**own, "loc": ("body", *own["loc"])} for own in errors]) from error


def _length(rendered: Any) -> int:
    _, (engine_input,) = rendered
    return len(engine_input["prompt_token_ids"])


async def _raising_as_written(events: AsyncGenerator[str, None], places: list[int]) -> AsyncGenerator[str, None]:
    with _named_as_written(places):
        async with aclosing(events):
            async for event in events:
                yield event


@contextmanager
def _named_as_written(tool_places: list[int]) -> Iterator[None]:
    """Have errors name fields as the client wrote them; `tool_places` are the client's numbers of the tools."""
    try:
        yield
    except Exception as error:
        told = as_api_error(error)
        if not told.param:
            raise
        _rename(told, tool_places)
        raise told from (error if told is not error else error.__cause__)


def _rename(error: ApiError, tool_places: list[int]) -> None:
    own = error.param or ""
    renamed = own
    for pattern, written in _AS_WRITTEN:
        renamed = pattern.sub(written, renamed)
    if (match := re.match(r"tools\.(\d+)", renamed)) and int(match[1]) < len(tool_places):
        renamed = f"tools.{tool_places[int(match[1])]}{renamed[match.end() :]}"
    error.message = error.message.replace(own, renamed)
    error.param = renamed
