"""POST /v1/completions: raw prompts, the same for every specialist."""

from fastapi import APIRouter, Request
from fastapi.responses import Response
from vllm.entrypoints.openai.completion.protocol import CompletionRequest

from ultrafuser.server.api.response import BODY_ERRORS, to_response
from ultrafuser.server.requests.checked_route import CheckedRoute
from ultrafuser.server.serving.openapi import answer
from ultrafuser.server.serving.serving import Serving

router = APIRouter(route_class=CheckedRoute, responses=BODY_ERRORS)


@router.post("/v1/completions", responses=answer("/v1/completions"))
async def create_completion(request: CompletionRequest, raw_request: Request) -> Response:
    """Continue a text or token ids; an event stream if `stream` is set."""
    serving: Serving = raw_request.app.state.serving
    return await to_response(await serving.completion.create_completion(request, raw_request), raw_request)
