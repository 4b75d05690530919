"""The class that the route calls: a response is asked for as a chat completion, and its stream made of the chat's.

Why vLLM's `OpenAIServingResponses` is not the base: nothing of our chat class acts there by itself (cache salt, trial
of constraints, limits, weights, one reading of tool calls), it loses parts of items, fails on others, ends every stream
as completed, and can be told to store. Over the chat, as vLLM's own class for Anthropic's API is, all of it holds, and
what is ours is the reading of items and the writing of events. Knows no HTTP but the request's id.
"""

import json
import time
from collections.abc import AsyncGenerator
from typing import Any, Protocol

from fastapi import Request
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

from ultrafuser.server.errors import InvalidRequest
from ultrafuser.server.requests.checks import check_request
from ultrafuser.server.requests.grammars import Constraint, GrammarCheck
from ultrafuser.server.requests.limits import RequestBounds
from ultrafuser.server.requests.responses_request import ResponsesRequest
from ultrafuser.server.serving.responses.chat_request import Asked
from ultrafuser.server.serving.responses.response_stream import ResponseStream
from ultrafuser.server.serving.thoughts import thought_in
from ultrafuser.server.serving.translation import as_api_error, error_in


class Chat(Protocol):
    """What is asked of the class for chat completions."""

    grammars: GrammarCheck
    default_sampling_params: dict[str, Any]
    enable_auto_tools: bool
    models: Any

    async def create_chat_completion(self, request: ChatCompletionRequest, raw_request: Request | None = None) -> Any:
        """The stream of an answer, or an error."""


class FusedServingResponses:
    """Responses by way of the chat."""

    def __init__(self, chat: Chat, bounds: RequestBounds) -> None:
        self._chat = chat
        self._bounds = bounds

    async def create(self, request: ResponsesRequest, raw_request: Request) -> ResponseStream:
        """The response that answers a request, in the making.

        Raises:
            ApiError: what is asked for cannot be served; about fields as the client wrote them.
        """
        asked = Asked.read(request)
        if asked.chat_choice == "auto" and not self._chat.enable_auto_tools:
            instead = "demand one (required, or by name), or leave tools out"
            message = f"tool_choice: auto needs the fusion file's tool_call_parser; without one {instead}."
            raise InvalidRequest(message, "tool_choice")
        try:
            strict = await self._strict(asked)
            try:
                chat = asked.chat(strict)
                chunks = await self._chunks(chat, raw_request)
            except InvalidRequest as error:
                if error.param != "tools" or not any(strict.values()):
                    raise
                # Each can be kept, but not all of them together: nobody has asked for that.
                strict = dict.fromkeys(strict, False)
                chat = asked.chat(strict)
                chunks = await self._chunks(chat, raw_request)
        except Exception as error:
            raise asked.in_the_clients_words(as_api_error(error)) from error
        thought = thought_in(chat) if self._bounds.tells_thoughts else None
        return ResponseStream(self._shown(asked, strict, raw_request), asked.toolbox, chunks, thought)

    async def _chunks(self, chat: ChatCompletionRequest, raw_request: Request) -> AsyncGenerator[str, None]:
        check_request(chat, self._bounds)
        if chat.logprobs and self._bounds.tells_thoughts:
            chat.return_token_ids = True  # they say which are a thought's
        chunks = await self._chat.create_chat_completion(chat, raw_request)
        if (error := error_in(chunks)) is not None:
            raise error
        stream: AsyncGenerator[str, None] = chunks
        return stream

    async def _strict(self, asked: Asked) -> dict[str, bool]:
        """Of functions whose client leaves it open: whether calls follow their parameters, as they do where these can
        be kept.

        Beside a format that the answer has to have it is always open: only a call that is held to something is possible
        there.
        """
        strict: dict[str, bool] = {}
        is_open = {None, False} if asked.chat_choice == "auto" and asked.response_format else {None}
        for tool in asked.offered if asked.chat_choice != "none" else ():
            if tool.kind == "function" and tool.strict in is_open and tool.parameters:
                try:
                    await self._chat.grammars.check(Constraint("JSON", json.dumps(tool.parameters), tool.place))
                    strict[tool.flat] = True
                except InvalidRequest:
                    strict[tool.flat] = False
        return strict

    def _shown(self, asked: Asked, strict: dict[str, bool], raw_request: Request) -> dict[str, Any]:
        """What a response shows of its request, and of what was taken where it says nothing."""
        request, defaults = asked.request, self._chat.default_sampling_params
        reasoning = request.reasoning
        return {
            "id": f"resp_{raw_request.headers['x-request-id']}",
            "object": "response",
            "created_at": int(time.time()),
            "model": self._chat.models.model_name(),
            "background": False,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "max_tool_calls": request.max_tool_calls,
            "metadata": request.metadata or {},
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "prompt_cache_key": request.prompt_cache_key,
            "reasoning": {"effort": reasoning and reasoning.effort, "summary": reasoning and reasoning.summary},
            "safety_identifier": request.safety_identifier,
            "service_tier": "default",
            "store": False,
            "temperature": _first(request.temperature, defaults.get("temperature"), 1.0),
            "text": asked.text,
            "tool_choice": asked.choice,
            "tools": asked.toolbox.echo(strict),
            "top_logprobs": request.top_logprobs or 0,
            "top_p": _first(request.top_p, defaults.get("top_p"), 1.0),
            "truncation": "disabled",
            "user": request.user,
        }


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)
