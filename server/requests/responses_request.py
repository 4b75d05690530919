"""The body of POST /v1/responses, as OpenAI's clients send it, and its form.

A model of our own: vLLM's refuses nulls, kinds of tools it has not heard of, and what agents send beside, and takes
fields that write prompts past the renderer. Items and tools are looked at where they are turned into a conversation
(`server/serving/responses/`), which names the place of what is wrong. Knows fields, neither items nor engines.
"""

from typing import Any

from openai.types.shared import Reasoning
from pydantic import BaseModel, ConfigDict

from ultrafuser.server.requests.bodies import BodyForm

SAMPLING_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "seed",
    "min_tokens",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "skip_special_tokens",
    "structured_outputs",
    "chat_template_kwargs",
    "cache_salt",
    "priority",
    "repetition_detection",
    "vllm_xargs",
    "session_id",
    "parallel_tool_calls",
)
"""Fields that mean what they mean to a chat completion, by the same name."""


class ResponsesRequest(BaseModel):
    """What a model is to answer: items of a conversation, and how."""

    model_config = ConfigDict(extra="allow")

    input: str | list[Any]
    model: str | None = None
    instructions: str | None = None
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: dict[str, Any] | None = None
    reasoning: Reasoning | None = None
    include: list[str] | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    stream: bool | None = None
    metadata: dict[str, str] | None = None

    # Accepted; nothing here acts on them.
    store: bool | None = None
    stream_options: dict[str, Any] | None = None
    max_tool_calls: int | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    user: str | None = None
    client_metadata: dict[str, Any] | None = None
    context_management: list[Any] | None = None

    # Refused by name, but for the value that asks for nothing.
    background: bool | None = None
    background_options: Any = None
    conversation: Any = None
    moderation: Any = None
    previous_response_id: str | None = None
    prompt: Any = None
    truncation: str | None = None

    # Not OpenAI's: as on /v1/chat/completions.
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    min_tokens: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    skip_special_tokens: bool | None = None
    structured_outputs: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    cache_salt: str | None = None
    priority: int | None = None
    repetition_detection: dict[str, Any] | None = None
    vllm_xargs: dict[str, Any] | None = None
    session_id: str | None = None


RESPONSES_FORM = BodyForm(
    token_id_fields=frozenset({"allowed_token_ids"}),
    wide_fields=frozenset({"input", "tools", "text", "structured_outputs", "chat_template_kwargs"}),
)
"""Bodies of responses."""
