"""POST /v1/gate/analyze: how much each specialist counts for every token of a given text."""

import asyncio
from collections.abc import Awaitable
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest

from ultrafuser.server.api.response import BODY_ERRORS
from ultrafuser.server.errors import ContextTooLong, InvalidRequest
from ultrafuser.server.requests.checked_route import CheckedRoute
from ultrafuser.server.requests.checks import check_request
from ultrafuser.server.requests.limits import RequestBounds
from ultrafuser.server.requests.mark_fields import GATE_WEIGHTS
from ultrafuser.server.requests.unsupported import refuse_calls
from ultrafuser.server.serving.serving import Serving
from ultrafuser.server.serving.text_tokens import TextToken, tokens_of
from ultrafuser.server.serving.translation import error_in

router = APIRouter(route_class=CheckedRoute)


class GateAnalysisRequest(BaseModel):
    """A raw text, or a conversation and an answer to it."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    model: str | None = None
    """The served name; null takes it."""

    text: Annotated[str, Field(min_length=1)] | None = None
    """Read by every specialist as it is, without a template."""

    messages: list[dict[str, Any]] | None = None
    """A conversation that ends before the answer; each specialist reads it in its own template."""

    answer: Annotated[str, Field(min_length=1)] | None = None
    """The answer to it, whose tokens are weighed."""


@check_request.register
def _check(request: GateAnalysisRequest, _bounds: RequestBounds) -> None:
    if (request.text is None) == (request.messages is None):
        raise InvalidRequest("text: send either a text, or messages and an answer.", "text")
    if (request.messages is None) != (request.answer is None):
        raise InvalidRequest("answer: messages and an answer go together.", "answer")


@router.post("/v1/gate/analyze", responses=BODY_ERRORS)
async def analyze(request: GateAnalysisRequest, raw_request: Request) -> JSONResponse:
    """Every token of the text or the answer with its fused log probability and the gate's weights, teacher-forced."""
    serving: Serving = raw_request.app.state.serving
    analyze_own = _analyze_answer if request.text is None else _analyze_text
    return await analyze_own(serving, request, raw_request)


async def _analyze_text(serving: Serving, request: GateAnalysisRequest, raw_request: Request) -> JSONResponse:
    """The first token is the prompt: nothing predicts it."""
    first, *rest = await _read(serving, request.text or "", "text", add_special_tokens=True)
    if not rest:
        raise InvalidRequest("text: has one token only, which nothing predicts; send more.", "text")
    own: dict[str, Any] = {"prompt": [first.token_id], "logprobs": 0}
    asked = CompletionRequest(**_common(request, rest), **own)
    response = await _answered(serving, serving.completion.create_completion(asked, raw_request), rest, "text")
    tokens = _weighed(response, rest, response.choices[0].logprobs.token_logprobs)
    return _body(serving, response, [_shown(first, None, None), *tokens])


async def _analyze_answer(serving: Serving, request: GateAnalysisRequest, raw_request: Request) -> JSONResponse:
    answer = await _read(serving, request.answer or "", "answer", add_special_tokens=False)
    asked = ChatCompletionRequest(messages=request.messages, logprobs=True, top_logprobs=0, **_common(request, answer))
    refuse_calls(asked.messages)  # those of the model made of them, which may leave calls that can be read only once
    response = await _answered(serving, serving.chat.create_chat_completion(asked, raw_request), answer, "answer")
    logprobs = [entry.logprob for entry in response.choices[0].logprobs.content]
    return _body(serving, response, _weighed(response, answer, logprobs))


async def _answered(serving: Serving, asking: Awaitable[Any], given: list[TextToken], param: str) -> Any:
    """What the serving class gave; a text that was cut, since it does not fit beside its prompt, is refused."""
    response = await asking
    if (told := error_in(response)) is not None:
        raise told
    (choice,) = response.choices
    if list(choice.token_ids) != _ids(given):
        found = f"has {len(given)} tokens beside {response.usage.prompt_tokens} of the prompt"
        raise _too_long(serving, param, found)
    return response


def _common(request: GateAnalysisRequest, given: list[TextToken]) -> dict[str, Any]:
    return {
        "model": request.model,
        "max_tokens": len(given),
        "temperature": 0.0,
        "ignore_eos": True,
        "return_token_ids": True,
        "vllm_xargs": {"forced_token_ids": _ids(given), GATE_WEIGHTS: True},
        GATE_WEIGHTS: True,
    }


async def _read(serving: Serving, text: str, param: str, *, add_special_tokens: bool) -> list[TextToken]:
    limit = serving.bounds.context_length
    if len(text) > limit * serving.tokenizer.max_chars_per_token:
        raise _too_long(serving, param, f"has {len(text)} characters, more than so many tokens can hold")
    tokens = await asyncio.to_thread(tokens_of, serving.tokenizer, text, add_special_tokens=add_special_tokens)
    if len(tokens) > limit:
        raise _too_long(serving, param, f"has {len(tokens)} tokens")
    foreign = next((token_id for token_id in _ids(tokens) if token_id >= serving.bounds.num_shared_ids), None)
    if foreign is not None:
        raise InvalidRequest(f"{param}: token id {foreign} is not shared by all specialists; change the text.", param)
    return tokens


def _too_long(serving: Serving, param: str, found: str) -> ContextTooLong:
    limit = f"This model's maximum context length is {serving.bounds.context_length} tokens"
    return ContextTooLong(f"{limit}. However, {param} {found}. Please reduce the length.", param)


def _ids(tokens: list[TextToken]) -> list[int]:
    return [token.token_id for token in tokens]


def _weighed(response: Any, tokens: list[TextToken], logprobs: list[float | None]) -> list[dict[str, Any]]:
    rows = zip(tokens, logprobs, response.choices[0].gate_weights["content"], strict=True)
    return [_shown(token, logprob, weights) for token, logprob, weights in rows]


def _shown(token: TextToken, logprob: float | None, weights: list[float] | None) -> dict[str, Any]:
    return {
        "token": token.text,
        "bytes": list(token.own_bytes),
        "token_id": token.token_id,
        "logprob": logprob,
        GATE_WEIGHTS: weights,
    }


def _body(serving: Serving, response: Any, tokens: list[dict[str, Any]]) -> JSONResponse:
    return JSONResponse(
        {
            "object": "gate.analysis",
            "model": response.model,
            "specialists": list(serving.specialists),
            "tokens": tokens,
            "mean": response.choices[0].gate_weights["mean"],
        }
    )
