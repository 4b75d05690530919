"""POST /v1/chat/completions."""

from fastapi import APIRouter, Request
from fastapi.responses import Response
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest, ChatCompletionResponse
from vllm.entrypoints.serve.utils.api_utils import with_cancellation

from server.api.response import BODY_ERRORS, to_response
from server.requests.bodies import JsonRoute
from server.requests.limits import check_limits
from server.requests.unsupported import notice_unknown_fields, refuse_foreign_ids, refuse_unfused_chat
from server.serving.gate_weights import ask_for_weights
from server.serving.serving import Serving

router = APIRouter(route_class=JsonRoute)


@router.post(
    "/v1/chat/completions",
    responses=BODY_ERRORS | {200: {"model": ChatCompletionResponse}},
)
@with_cancellation
async def create_chat_completion(request: ChatCompletionRequest, raw_request: Request) -> Response:
    """Answer a conversation; an event stream if `stream` is set. The engine's request ends when the client leaves."""
    serving: Serving = raw_request.app.state.serving
    refuse_unfused_chat(request)
    check_limits(request, raw_request.app.state.limits, serving.bounds)
    refuse_foreign_ids(request, serving.num_shared_ids)
    ask_for_weights(request)
    notice_unknown_fields(request)
    return await to_response(await serving.chat.create_chat_completion(request, raw_request))
