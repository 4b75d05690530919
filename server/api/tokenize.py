"""POST /tokenize and /detokenize. A conversation's tokens are those of its longest rendering, which counts."""

from fastapi import APIRouter, Request
from fastapi.responses import Response
from vllm.entrypoints.serve.tokenize.protocol import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeChatRequest,
    TokenizeRequest,
    TokenizeResponse,
)
from vllm.entrypoints.serve.utils.api_utils import with_cancellation

from server.api.response import BODY_ERRORS, to_response
from server.requests.bodies import JsonRoute
from server.requests.unsupported import refuse_foreign_tokens, refuse_unfused_chat
from server.serving.serving import Serving

router = APIRouter(route_class=JsonRoute, responses=BODY_ERRORS)


@router.post("/tokenize", responses={200: {"model": TokenizeResponse}})
@with_cancellation
async def tokenize(request: TokenizeRequest, raw_request: Request) -> Response:
    """Token ids of a text, or of the longest of the n prompts that a conversation becomes."""
    serving: Serving = raw_request.app.state.serving
    if isinstance(request, TokenizeChatRequest):
        refuse_unfused_chat(request)
    return await to_response(await serving.tokenization.create_tokenize(request, raw_request))


@router.post("/detokenize", responses={200: {"model": DetokenizeResponse}})
@with_cancellation
async def detokenize(request: DetokenizeRequest, raw_request: Request) -> Response:
    """Text of token ids of the shared vocabulary."""
    serving: Serving = raw_request.app.state.serving
    refuse_foreign_tokens(request, serving.num_shared_ids)
    return await to_response(await serving.tokenization.create_detokenize(request, raw_request))
