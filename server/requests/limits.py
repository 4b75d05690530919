"""What a request's numbers, lists and strings may be at most: checked before anything is rendered or tokenized.

vLLM checks most ranges too, but later, in its own words, and not always by the field's name. What is here is what it
does not bound, or bounds for a whole process by an environment variable. Knows requests, not engines.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest

from ultrafuser.server.errors import InvalidRequest
from ultrafuser.server.settings import Limits

MAX_BIAS = 100
"""OpenAI's range of `logit_bias`; vLLM would clip."""


@dataclass(frozen=True)
class RequestBounds:
    """What this server's settings, its engine and its specialists let a request ask for at most."""

    limits: Limits

    max_logprobs: int
    """Log probabilities per token; -1: the whole vocabulary, which a request may then ask for by -1, too."""

    has_priorities: bool
    """Whether requests are scheduled by their `priority`."""

    num_shared_ids: int
    """Token ids below this are shared by all specialists; only they have fused logits."""

    context_length: int
    """Most tokens of a prompt and its response together."""

    tells_thoughts: bool = False
    """Whether thoughts are told apart from answers."""


def check_limits(request: ChatCompletionRequest | CompletionRequest, bounds: RequestBounds) -> None:
    """Check a generation request.

    Raises:
        InvalidRequest: naming the field, what it is and what it may be.
    """
    limits = bounds.limits
    if request.model == "":
        raise InvalidRequest("model: is empty; name the served model or leave the field out.", "model")
    _check_responses(request, limits.max_responses)
    _check_strings("stop", request.stop, limits.max_stop_chars)
    _check_strings("bad_words", request.bad_words, limits.max_stop_chars)
    _check_bias(request.logit_bias or {})
    for name, number, most in _ranges(request, bounds):
        if number is not None and not 0 <= number <= most:
            raise InvalidRequest(f"{name}: must be 0 to {most}, got {_short(number)}.", name)
    if getattr(request, "max_completion_tokens", None) == 0:
        raise InvalidRequest("max_completion_tokens: must be at least 1, got 0.", "max_completion_tokens")
    if request.priority and not bounds.has_priorities:
        raise InvalidRequest("priority: requests are served in order; start with --scheduling-policy.", "priority")
    check_token_ids("logit_bias", map(int, request.logit_bias or ()), bounds.num_shared_ids)
    for name in ("stop_token_ids", "allowed_token_ids", "logprob_token_ids"):
        check_token_ids(name, getattr(request, name) or (), bounds.num_shared_ids)


def check_token_ids(field: str, ids: Iterable[int], num_shared_ids: int) -> None:
    """Check token ids that a request names.

    Raises:
        InvalidRequest: naming the field and the first id outside of the shared vocabulary.
    """
    foreign = next((token_id for token_id in ids if not 0 <= token_id < num_shared_ids), None)
    if foreign is not None:
        shared = f"the vocabulary that all specialists share, 0 to {num_shared_ids - 1}"
        raise InvalidRequest(f"{field}: token id {foreign} is outside of {shared}.", field)


def _ranges(
    request: ChatCompletionRequest | CompletionRequest, bounds: RequestBounds
) -> Iterator[tuple[str, int | None, int]]:
    """Fields that count something, with the most they may be; what does not fit into the context is cut later."""
    is_chat = isinstance(request, ChatCompletionRequest)
    logprobs = request.top_logprobs if is_chat else request.logprobs
    if bounds.max_logprobs != -1:
        yield "top_logprobs" if is_chat else "logprobs", logprobs, bounds.max_logprobs
        yield "prompt_logprobs", request.prompt_logprobs, bounds.max_logprobs
    if is_chat:
        yield "max_completion_tokens", request.max_completion_tokens, 2**31 - 1
    yield "max_tokens", request.max_tokens, 2**31 - 1
    yield "min_tokens", request.min_tokens, 2**31 - 1
    yield "top_k", None if request.top_k == -1 else request.top_k, 2**31 - 1


def _check_responses(request: ChatCompletionRequest | CompletionRequest, most: int) -> None:
    n = 1 if request.n is None else request.n
    if not 1 <= n <= most:
        raise InvalidRequest(f"n: must be 1 to {most}, got {_short(n)}.", "n")
    prompt = getattr(request, "prompt", None)
    prompts = len(prompt) if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1
    if prompts * n > most:
        param = "n" if n > 1 else "prompt"
        raise InvalidRequest(f"{param}: {prompts} prompts with n = {n} are more than {most} responses.", param)


def _check_strings(field: str, strings: str | Sequence[str] | None, max_chars: int) -> None:
    for text in [strings] if isinstance(strings, str) else strings or ():
        if not 1 <= len(text) <= max_chars:
            found = f"a string of {len(text)} characters; each must have 1 to {max_chars}"
            raise InvalidRequest(f"{field}: {found}.", field)


def _check_bias(logit_bias: dict[str, float]) -> None:
    for key, bias in logit_bias.items():
        if not (key.isascii() and key.isdecimal()) or len(key) > 18:
            raise InvalidRequest(f"logit_bias: {key[:20]!r} is no token id.", "logit_bias")
        if not math.isfinite(bias) or abs(bias) > MAX_BIAS:
            raise InvalidRequest(f"logit_bias: must be -{MAX_BIAS} to {MAX_BIAS}, got {bias}.", "logit_bias")


def _short(number: Any) -> str:
    """A number as a message shows it; Python refuses to write very long ones."""
    return str(number) if abs(number) < 10**20 else "a number of more than 20 digits"
