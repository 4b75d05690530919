"""POST /v1/responses, and the routes of stored responses, of which there are none."""

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from ultrafuser.server.api.response import BODY_ERRORS, READ_ERRORS, error_responses, stream
from ultrafuser.server.dialects import ends_with
from ultrafuser.server.errors import NotStored
from ultrafuser.server.requests.checked_route import CheckedRoute
from ultrafuser.server.requests.responses_request import RESPONSES_FORM, ResponsesRequest
from ultrafuser.server.serving.openapi import answer
from ultrafuser.server.serving.responses.response_stream import as_json
from ultrafuser.server.serving.serving import Serving


class ResponsesRoute(CheckedRoute):
    """A route whose body is a request for a response."""

    form = RESPONSES_FORM


router = APIRouter(route_class=ResponsesRoute, responses=BODY_ERRORS)
stored = APIRouter(responses=READ_ERRORS | error_responses(404))


@router.post("/v1/responses", responses=answer("/v1/responses"))
async def create_response(request: ResponsesRequest, raw_request: Request) -> Response:
    """Answer items of a conversation; an event stream if `stream` is set. The engine's request ends when the client
    leaves."""
    serving: Serving = raw_request.app.state.serving
    response = await serving.responses.create(request, raw_request)
    if not request.stream:
        return JSONResponse(as_json(await response.whole()))
    ends_with(raw_request.scope, response.last_events)
    return await stream(response.events(), raw_request)


@stored.get("/v1/responses/{response_id}")
@stored.delete("/v1/responses/{response_id}")
@stored.get("/v1/responses/{response_id}/input_items")
@stored.post("/v1/responses/{response_id}/cancel")
async def find_response(response_id: str) -> Response:
    """404: no response is stored."""
    raise NotStored(f"The response {response_id[:64]!r} is not here: this server stores none, whatever `store` says.")


router.include_router(stored)
