"""Answers of /v1/messages: what a chat completion says, in Anthropic's words. Knows no routes and no requests' fields.

vLLM has converters of its own; they read the arguments of every call as JSON (one that `max_tokens` cuts off is none),
leave out fields that Anthropic's clients need, and turn every error into an event of their own.
"""

import json
from collections.abc import Sequence
from typing import Any, Literal

import jiter
from pydantic import ConfigDict
from vllm.entrypoints.anthropic.protocol import (
    AnthropicContentBlock,
    AnthropicCountTokensResponse,
    AnthropicMessagesResponse,
    AnthropicStreamEvent,
    AnthropicUsage,
)
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse
from vllm.entrypoints.serve.engine.protocol import UsageInfo

from ultrafuser.server.requests.mark_fields import MARK_FIELDS

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]


SIGNATURE = "ultrafuser"
"""Of every thought: clients send it back, and whatever it is, it is taken by every replica."""


class Message(AnthropicMessagesResponse):
    """A whole answer; only what was set is sent."""

    model_config = ConfigDict(extra="allow")

    stop_reason: StopReason | None = None


class MessageEvent(AnthropicStreamEvent):
    """An event of a stream; for the API's schema."""

    model_config = ConfigDict(extra="allow")

    message: Message | None = None


class TokenCount(AnthropicCountTokensResponse):
    """How long a prompt is: of its renderings the longest."""


def message_id(request_id: str) -> str:
    """A message's id, by the one that vLLM gives the request."""
    return request_id.replace("chatcmpl-", "msg_", 1)


def message(response: ChatCompletionResponse, asked_tokens: int) -> Message:
    """The message that a chat completion with one choice is; `asked_tokens` is the client's `max_tokens`."""
    (choice,) = response.choices
    blocks = []
    if thought := choice.message.reasoning:
        blocks.append(AnthropicContentBlock(type="thinking", thinking=thought, signature=SIGNATURE))
    if choice.message.content:
        blocks.append(AnthropicContentBlock(type="text", text=choice.message.content))
    calls = [call.function.arguments for call in choice.message.tool_calls]
    for call in choice.message.tool_calls:
        own = {"id": call.id, "name": call.function.name, "input": as_far_as_told(call.function.arguments)}
        blocks.append(AnthropicContentBlock(type="tool_use", **own))
    assert response.usage is not None
    reason, sequence = stop_of(choice.finish_reason, choice.stop_reason, calls, response.usage, asked_tokens)
    marks = {name: getattr(choice, name) for name in MARK_FIELDS if hasattr(choice, name)}
    if hasattr(response, "specialists"):
        marks["specialists"] = response.specialists
    return Message(
        id=message_id(response.id),
        type="message",
        role="assistant",
        model=response.model,
        content=blocks or [AnthropicContentBlock(type="text", text="")],  # clients look at the first
        stop_reason=reason,
        stop_sequence=sequence,
        usage=usage_of(response.usage),
        **marks,
    )


def as_far_as_told(arguments: str) -> dict[str, Any]:
    """Arguments of a call, read as Anthropic's clients read those of a stream: what is cut off is left out."""
    try:
        value = jiter.from_json(arguments.encode(), partial_mode=True)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def is_complete(arguments: str) -> bool:
    """Whether the arguments of a call are an object, to its end."""
    try:
        return isinstance(json.loads(arguments), dict)
    except (ValueError, RecursionError):
        return False


def stop_of(
    finish_reason: str | None,
    matched: int | str | None,
    calls: Sequence[str],
    usage: UsageInfo,
    asked_tokens: int,
) -> tuple[StopReason, str | None]:
    """Why an answer ended, and at which stop sequence.

    `matched` is the stop string, or the id of a stop token; `calls` are the arguments of its calls. A call that was cut
    off must not be run: then the answer did not end to have it run.
    """
    if finish_reason == "length":
        is_cut_by_context = (usage.completion_tokens or 0) < asked_tokens
        return "model_context_window_exceeded" if is_cut_by_context else "max_tokens", None
    if isinstance(matched, str) and not (calls and all(map(is_complete, calls))):
        return "stop_sequence", matched
    return "tool_use" if calls else "end_turn", None


def usage_of(usage: UsageInfo) -> AnthropicUsage:
    """Tokens; those that were found in the prefix cache are not among `input_tokens`."""
    details = usage.prompt_tokens_details
    read = (details and details.cached_tokens) or 0
    created = (details and details.created_cache_tokens) or 0
    return AnthropicUsage(
        input_tokens=usage.prompt_tokens - read - created,
        cache_creation_input_tokens=created,
        cache_read_input_tokens=read,
        output_tokens=usage.completion_tokens or 0,
    )


def event(kind: str, **data: Any) -> str:
    """One server-sent event of Anthropic's."""
    return f"event: {kind}\ndata: {json.dumps({'type': kind} | data, ensure_ascii=False)}\n\n"
