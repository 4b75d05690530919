"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API."""

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from ultrafuser.server.api.response import ANTHROPIC_ERRORS, stream
from ultrafuser.server.requests.anthropic_bodies import ANTHROPIC_FORM, CountTokensRequest, MessagesRequest
from ultrafuser.server.requests.checked_route import CheckedRoute
from ultrafuser.server.serving.message_answers import Message
from ultrafuser.server.serving.openapi import answer
from ultrafuser.server.serving.serving import Serving


class MessagesRoute(CheckedRoute):
    """A route whose body has blocks in the place of text."""

    form = ANTHROPIC_FORM


router = APIRouter(route_class=MessagesRoute, responses=ANTHROPIC_ERRORS)


@router.post("/v1/messages", responses=answer("/v1/messages"))
async def create_message(request: MessagesRequest, raw_request: Request) -> Response:
    """Answer a conversation; an event stream if `stream` is set. The engine's request ends when the client leaves."""
    serving: Serving = raw_request.app.state.serving
    result = await serving.messages.create_messages(request, raw_request)
    if isinstance(result, Message):
        return JSONResponse(result.model_dump(exclude_unset=True))
    return await stream(result, raw_request)


@router.post("/v1/messages/count_tokens", responses=answer("/v1/messages/count_tokens"))
async def count_tokens(request: CountTokensRequest, raw_request: Request) -> Response:
    """How many tokens the prompt of a conversation has, in its longest rendering."""
    serving: Serving = raw_request.app.state.serving
    return JSONResponse((await serving.messages.count_tokens(request)).model_dump(exclude_unset=True))
