"""The one check that every request with a body passes between its validation and its route.

Each kind of request has its own, in the order in which its faults are told; a kind without one is not served
(`server/requests/checked_route.py`). Knows requests, neither routes nor engines.
"""

from functools import singledispatch

from pydantic import BaseModel
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.serve.tokenize.protocol import DetokenizeRequest, TokenizeChatRequest, TokenizeCompletionRequest

from ultrafuser.server.requests.context import cut_to_context
from ultrafuser.server.requests.limits import RequestBounds, check_limits, check_token_ids
from ultrafuser.server.requests.mark_fields import ask_for_marks
from ultrafuser.server.requests.responses_request import ResponsesRequest
from ultrafuser.server.requests.thinking_fields import SWITCHES, settle_switches, settle_thinking
from ultrafuser.server.requests.unsupported import (
    CHAT_REFUSALS,
    COMPLETION_REFUSALS,
    RESPONSES_REFUSALS,
    TOKENIZE_REFUSALS,
    notice_unknown_fields,
    refuse,
    refuse_calls,
)


@singledispatch
def check_request(request: BaseModel, bounds: RequestBounds) -> None:
    """Check a request, and put it into the form in which vLLM does what was asked for.

    Raises:
        InvalidRequest: naming the field to change.
    """
    raise AssertionError(f"nothing is checked of a {type(request).__name__}")


def is_checked(kind: type) -> bool:
    """Whether there is a check for this kind of request."""
    return check_request.dispatch(kind) is not check_request.dispatch(object)


@check_request.register(ChatCompletionRequest)
def _check_chat(request: ChatCompletionRequest, bounds: RequestBounds) -> None:
    refuse(CHAT_REFUSALS, request)
    refuse_calls(request.messages)
    settle_thinking(request, can_be_told=bounds.tells_thoughts)
    if request.echo:
        # vLLM turns echo's default top_logprobs of 0 into a wish for prompt logprobs; None is no wish.
        request.top_logprobs = None
    _check_generation(request, bounds, SWITCHES)


@check_request.register(CompletionRequest)
def _check_completion(request: CompletionRequest, bounds: RequestBounds) -> None:
    refuse(COMPLETION_REFUSALS, request)
    _check_generation(request, bounds)


def _check_generation(
    request: ChatCompletionRequest | CompletionRequest, bounds: RequestBounds, known: tuple[str, ...] = ()
) -> None:
    check_limits(request, bounds)
    cut_to_context(request, bounds.context_length)
    ask_for_marks(request)
    notice_unknown_fields(request, known)


@check_request.register(ResponsesRequest)
def _check_responses(request: ResponsesRequest, _bounds: RequestBounds) -> None:
    """The rest is checked of the chat completion that it becomes."""
    refuse(RESPONSES_REFUSALS, request)
    notice_unknown_fields(request)


@check_request.register(TokenizeChatRequest)
def _check_tokenize_chat(request: TokenizeChatRequest, _bounds: RequestBounds) -> None:
    refuse(TOKENIZE_REFUSALS, request)
    refuse_calls(request.messages)
    settle_switches(request)


@check_request.register(TokenizeCompletionRequest)
def _check_tokenize_text(_request: TokenizeCompletionRequest, _bounds: RequestBounds) -> None:
    """A text of any length has tokens."""


@check_request.register(DetokenizeRequest)
def _check_detokenize(request: DetokenizeRequest, bounds: RequestBounds) -> None:
    check_token_ids("tokens", request.tokens, bounds.num_shared_ids)
