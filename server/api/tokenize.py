"""POST /tokenize and /detokenize. A conversation's tokens are those of its longest rendering, which counts."""

from fastapi import APIRouter, Request
from fastapi.responses import Response
from vllm.entrypoints.serve.tokenize.protocol import DetokenizeRequest, TokenizeRequest

from ultrafuser.server.api.response import BODY_ERRORS, to_response
from ultrafuser.server.requests.checked_route import CheckedRoute
from ultrafuser.server.serving.openapi import answer
from ultrafuser.server.serving.serving import Serving

router = APIRouter(route_class=CheckedRoute, responses=BODY_ERRORS)


@router.post("/tokenize", responses=answer("/tokenize"))
async def tokenize(request: TokenizeRequest, raw_request: Request) -> Response:
    """Token ids of a text, or of the longest of the n prompts that a conversation becomes."""
    serving: Serving = raw_request.app.state.serving
    return await to_response(await serving.tokenization.create_tokenize(request, raw_request), raw_request)


@router.post("/detokenize", responses=answer("/detokenize"))
async def detokenize(request: DetokenizeRequest, raw_request: Request) -> Response:
    """Text of token ids of the shared vocabulary."""
    serving: Serving = raw_request.app.state.serving
    return await to_response(await serving.tokenization.create_detokenize(request, raw_request), raw_request)
