"""What a request may not ask for because it is not fused: found and refused before anything is rendered.

Four reasons: the feature reads one model's logits outside the fused step (beam search, prompt logprobs where the
specialists' prompts differ); it is not text (media, embeddings); it lets the specialists read different things (a
template, documents in the request); or nothing here acts on it, and a response without it would not be what was asked
for (watermarks, `functions`).
One table per request type names field and way out. Knows requests, not engines.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from ultrafuser.server.errors import UnsupportedParameter
from ultrafuser.server.metrics import REFUSED
from ultrafuser.server.requests.mark_fields import MARK_FIELDS

RESERVED_TEMPLATE_KEYS = frozenset(
    {"chat_template", "conversation", "eos_token", "model_config", "return_dict", "tokenize", "tokenizer", "tools"}
)
"""Keys of `chat_template_kwargs` that belong to the server: they would change how, not what, is rendered."""

RESERVED_EXTRA_ARGS = frozenset(
    {"specialist_prompts", "forced_token_ids", "thought", "kv_transfer_params", "ec_transfer_params", *MARK_FIELDS}
)
"""Keys of `vllm_xargs` that belong to the server."""

MAX_NOTICED_FIELDS = 64
"""How many unknown fields are logged before nothing more is said about them."""

_noticed: set[str] = set()
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Refusal:
    """A field, when it counts as asked for, and what to do instead."""

    param: str
    is_asked: Callable[[Any], bool]
    instead: str


def _value(request: BaseModel, name: str) -> Any:
    """A field's value; as an attribute a deprecated one would warn."""
    own = request.__dict__
    return own[name] if name in own else (request.model_extra or {}).get(name)


def _given(name: str) -> Callable[[Any], bool]:
    # By type: 0 equals False, but "no logprobs" is a wish where "false" is none.
    return lambda request: (
        (value := _value(request, name)) is not None and value is not False and not _says_nothing(value)
    )


def _says_nothing(value: Any) -> bool:
    return isinstance(value, dict) and all(item is None for item in value.values())


def _echoes_logprobs(request: Any) -> bool:
    return bool(request.echo) and request.logprobs not in (None, False)


def _several(name: str) -> Callable[[Any], bool]:
    return lambda request: isinstance(value := _value(request, name), int) and value > 1


def _reserved(name: str, keys: frozenset[str]) -> Callable[[Any], bool]:
    return lambda request: not keys.isdisjoint(_value(request, name) or {})


def _other_than(name: str, *harmless: Any) -> Callable[[Any], bool]:
    return lambda request: _value(request, name) not in (None, *harmless)


def _set(name: str) -> Callable[[Any], bool]:
    return lambda request: name in request.model_fields_set


_EVERYWHERE = (
    Refusal("specialist_prompts", _given("specialist_prompts"), "the server renders the prompts; send messages"),
    Refusal("extra_args", _reserved("extra_args", RESERVED_EXTRA_ARGS), "leave it out"),
    Refusal("vllm_xargs", _reserved("vllm_xargs", RESERVED_EXTRA_ARGS), "leave the server's own keys out of it"),
    Refusal("kv_transfer_params", _given("kv_transfer_params"), "leave it out"),
    Refusal("ec_transfer_params", _given("ec_transfer_params"), "leave it out"),
)

_GENERATION = (
    *_EVERYWHERE,
    Refusal("use_beam_search", _given("use_beam_search"), "sample instead, with n for several responses"),
    Refusal("best_of", _several("best_of"), "use n and choose yourself"),
    Refusal("length_penalty", _other_than("length_penalty", 1.0), "it belongs to beam search; leave it out"),
    Refusal("watermarking", _given("watermarking"), "leave it out"),
    Refusal("routed_experts_prompt_start", _other_than("routed_experts_prompt_start", 0), "leave it out"),
    Refusal("return_token_offsets", _given("return_token_offsets"), "leave it out"),
    Refusal("return_mm_kwargs", _given("return_mm_kwargs"), "only text is fused"),
    Refusal("mm_payload", _other_than("mm_payload", "tensors"), "only text is fused"),
    Refusal("request_id", _set("request_id"), "send the header X-Request-Id; it names the response, too"),
    *(
        Refusal(name, _given(name), "use structured_outputs or response_format")
        for name in ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
    ),
)

_TEMPLATES = (
    Refusal("chat_template", _given("chat_template"), "each specialist has its own, in the fusion file"),
    Refusal(
        "chat_template_kwargs",
        _reserved("chat_template_kwargs", RESERVED_TEMPLATE_KEYS),
        f"leave out {', '.join(sorted(RESERVED_TEMPLATE_KEYS))}",
    ),
    Refusal("documents", _given("documents"), "not every template shows them; put their text into a message"),
    Refusal("mm_processor_kwargs", _given("mm_processor_kwargs"), "only text is fused"),
    Refusal("media_io_kwargs", _given("media_io_kwargs"), "only text is fused"),
)

CHAT_REFUSALS = (
    *_GENERATION,
    *_TEMPLATES,
    Refusal("prompt_logprobs", _given("prompt_logprobs"), "specialists' prompts differ; send a raw one to completions"),
    Refusal("echo", _echoes_logprobs, "echo together with logprobs needs a raw prompt; send it to completions"),
    Refusal("truncate_prompt_tokens", _given("truncate_prompt_tokens"), "prompts differ in length; shorten messages"),
    Refusal("truncation_side", _given("truncation_side"), "prompts differ in length; shorten messages"),
    Refusal("functions", _given("functions"), "use tools"),
    Refusal("function_call", _given("function_call"), "use tool_choice"),
    Refusal("audio", _given("audio"), "only text is fused"),
    Refusal("modalities", _other_than("modalities", ["text"]), "only text is fused"),
    Refusal("prediction", _given("prediction"), "leave it out"),
    Refusal("web_search_options", _given("web_search_options"), "offer a search of your own as a tool"),
)
"""What `/v1/chat/completions` refuses, beside content that is not text."""

MESSAGES_REFUSALS = (
    *_GENERATION,
    *_TEMPLATES,
    Refusal("output_format", _given("output_format"), "use output_config.format"),
    Refusal("previous_input_messages", _given("previous_input_messages"), "send all turns as messages"),
    Refusal("enable_response_messages", _given("enable_response_messages"), "leave it out"),
)
"""What `/v1/messages` refuses, beside blocks that are not text."""

COMPLETION_REFUSALS = (
    *_GENERATION,
    Refusal("prompt_embeds", _given("prompt_embeds"), "send text or token ids"),
    Refusal("thinking_token_budget", _given("thinking_token_budget"), "nothing is told apart as thinking in raw text"),
    Refusal("suffix", _given("suffix"), "not every specialist can fill in; leave it out"),
)
"""What `/v1/completions` refuses."""

TOKENIZE_REFUSALS = (*_EVERYWHERE, *_TEMPLATES)
"""What `/tokenize` of messages refuses, beside content that is not text."""


_CHAT_ELSEWHERE = (
    Refusal("messages", _given("messages"), "send them as input"),
    Refusal("max_tokens", _given("max_tokens"), "use max_output_tokens"),
    Refusal("max_completion_tokens", _given("max_completion_tokens"), "use max_output_tokens"),
    Refusal("response_format", _given("response_format"), "use text.format"),
    Refusal("reasoning_effort", _given("reasoning_effort"), "use reasoning.effort"),
    Refusal("functions", _given("functions"), "use tools"),
    Refusal("function_call", _given("function_call"), "use tool_choice"),
)

RESPONSES_REFUSALS = (
    *_GENERATION,
    *_TEMPLATES,
    *_CHAT_ELSEWHERE,
    Refusal("thinking_token_budget", _given("thinking_token_budget"), "use reasoning.effort"),
    Refusal("n", _several("n"), "send a request for each response"),
    Refusal("background", _given("background"), "nothing is stored that could be asked for later; use stream"),
    Refusal("background_options", _given("background_options"), "leave it out"),
    Refusal("previous_response_id", _given("previous_response_id"), "nothing is stored; send all items as input"),
    Refusal("conversation", _given("conversation"), "nothing is stored; send all items as input"),
    Refusal("prompt", _given("prompt"), "no prompts are stored here; send instructions and input"),
    Refusal("truncation", _other_than("truncation", "disabled"), "leave items out yourself"),
    Refusal("moderation", _given("moderation"), "leave it out"),
    Refusal("previous_input_messages", _given("previous_input_messages"), "send all items as input"),
    Refusal("enable_response_messages", _given("enable_response_messages"), "leave it out"),
)
"""What `/v1/responses` refuses, beside items that are not text."""


def refuse(refusals: Iterable[Refusal], request: BaseModel) -> None:
    """Check a request against one of the tables above.

    Raises:
        UnsupportedParameter: naming the field and what to do instead.
    """
    for refusal in refusals:
        if refusal.is_asked(request):
            raise refused(refusal.param, f"{refusal.param} is not supported by a fused model: {refusal.instead}.")


def refuse_calls(messages: Iterable[Any]) -> None:
    """Check the tool calls of messages, which become plain lists.

    Raises:
        UnsupportedParameter: a call of a custom tool.
    """
    for index, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        # As with content: one that can be read only once would be there for the first specialist alone.
        message["tool_calls"] = list(message.get("tool_calls") or ())
        for position, call in enumerate(message["tool_calls"]):
            if call["type"] != "function":
                param = f"messages.{index}.tool_calls.{position}"
                raise refused(
                    param, f"{param}: {call['type']!r} is not supported; send calls of functions.", "messages"
                )


def notice_unknown_fields(request: BaseModel, known: Iterable[str] = ()) -> None:
    """Log, once per name, fields that the API does not know: they are accepted and have no effect."""
    for name in (request.model_extra or {}).keys() - {*MARK_FIELDS, *known} - _noticed:
        # A client can invent names for ever; neither the log nor this set is to grow with them.
        if len(_noticed) < MAX_NOTICED_FIELDS:
            _noticed.add(name)
            logger.info("requests have the unknown field %.64r, which has no effect", name)


def refused(param: str, message: str, label: str | None = None) -> UnsupportedParameter:
    """The error for a field, and count it, under the label if the field's name has a place in it."""
    REFUSED.labels(label or param).inc()
    return UnsupportedParameter(message, param)
