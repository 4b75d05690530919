"""Whether a request wants a model to think, and how much: one decision out of the fields in which clients say so.

Templates ask for it by different names (`enable_thinking`, `thinking`): all of them are told all. Knows requests, no
templates.
"""

from collections.abc import Iterator
from typing import Any

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.serve.tokenize.protocol import TokenizeChatRequest

from ultrafuser.server.errors import InvalidRequest
from ultrafuser.server.requests.unsupported import refused

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
"""Values of `reasoning_effort` that templates know."""

SWITCHES = ("enable_thinking", "thinking")
"""Names under which templates ask whether to think; also the request's own fields."""

_TYPES = {"enabled": True, "adaptive": True, "disabled": False}
"""Of a `thinking` object."""


def switches(*, is_on: bool) -> dict[str, bool]:
    """What templates are told."""
    return dict.fromkeys(SWITCHES, is_on)


def settle_thinking(request: ChatCompletionRequest, *, can_be_told: bool) -> None:
    """Put the decision where templates look, and the budget into `thinking_token_budget`.

    `can_be_told`: whether the server tells thoughts from answers.

    Raises:
        InvalidRequest: a field is of no known form, or two of them contradict each other.
        UnsupportedParameter: a budget, where nothing is told apart as thinking.
    """
    settle_switches(request)
    if not can_be_told:
        # vLLM would leave out logprobs and token ids together with it.
        request.include_reasoning = True
    _settle_budget(request, can_be_told)


def settle_switches(request: ChatCompletionRequest | TokenizeChatRequest) -> None:
    """Put the decision where templates look.

    Raises:
        InvalidRequest: a field is of no known form, or two of them contradict each other.
    """
    kwargs = dict(request.chat_template_kwargs or {})
    wishes = dict(_wishes(request, kwargs))
    for name, is_on in wishes.items():
        other = next((own for own, value in wishes.items() if value != is_on), None)
        if other is not None:
            raise InvalidRequest(f"{name}: contradicts {other}; say one of the two.", name)
    if wishes:
        told = switches(is_on=any(wishes.values()))
        own = {name: value for name, value in kwargs.items() if value is not None}
        request.chat_template_kwargs = told | own  # what is no switch there means something to one template only


def _wishes(request: ChatCompletionRequest | TokenizeChatRequest, kwargs: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    extra = request.model_extra or {}
    for name in SWITCHES:
        if (value := extra.get(name)) is not None:
            yield name, _switch(name, value)
        if isinstance(value := kwargs.get(name), bool):  # else it means something to one template only
            yield f"chat_template_kwargs.{name}", value
    if (effort := getattr(request, "reasoning_effort", None)) is not None:
        yield "reasoning_effort", effort != "none"


def _switch(name: str, value: Any) -> bool:
    if isinstance(value, dict) and name == "thinking":
        kind = value.get("type")
        if not isinstance(kind, str) or kind not in _TYPES:
            raise InvalidRequest(f"thinking.type: must be one of {', '.join(_TYPES)}.", "thinking.type")
        return _TYPES[kind]
    if not isinstance(value, bool):
        raise InvalidRequest(f"{name}: must be true or false.", name)
    return value


def _settle_budget(request: ChatCompletionRequest, can_be_told: bool) -> None:
    budget, name = request.thinking_token_budget, "thinking_token_budget"
    thinking = (request.model_extra or {}).get("thinking")
    own = thinking.get("budget_tokens") if isinstance(thinking, dict) else None
    if own is not None:
        if type(own) is not int or not 0 <= own < 2**31:
            raise InvalidRequest("thinking.budget_tokens: must be a number of tokens from 0.", "thinking.budget_tokens")
        if budget is not None and budget != own:
            raise InvalidRequest(f"thinking.budget_tokens: contradicts {name}; say one of the two.", name)
        budget, name = own, "thinking.budget_tokens"
    if budget is not None and not can_be_told:
        way_out = "nothing is told apart as thinking; start the server with --reasoning-parser"
        raise refused(name, f"{name} is not supported: {way_out}.")
    request.thinking_token_budget = budget
