"""POST /v1/chat/completions."""

from fastapi import APIRouter, Request
from fastapi.responses import Response
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

from ultrafuser.server.api.response import BODY_ERRORS, to_response
from ultrafuser.server.requests.checked_route import CheckedRoute
from ultrafuser.server.serving.openapi import answer
from ultrafuser.server.serving.serving import Serving

router = APIRouter(route_class=CheckedRoute, responses=BODY_ERRORS)


@router.post("/v1/chat/completions", responses=answer("/v1/chat/completions"))
async def create_chat_completion(request: ChatCompletionRequest, raw_request: Request) -> Response:
    """Answer a conversation; an event stream if `stream` is set. The engine's request ends when the client leaves."""
    serving: Serving = raw_request.app.state.serving
    return await to_response(await serving.chat.create_chat_completion(request, raw_request), raw_request)
