"""POST /v1/completions: raw prompts, the same for every specialist."""

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.serve.utils.api_utils import validate_json_request, with_cancellation

from server.api.response import error_responses, to_response
from server.gate_weights import ask_for_weights
from server.serving import Serving
from server.unfused import notice_unknown_fields, refuse_foreign_ids, refuse_unfused_completion

router = APIRouter()


@router.post(
    "/v1/completions",
    dependencies=[Depends(validate_json_request)],
    responses=error_responses(400, 401, 404, 500, 503),
)
@with_cancellation
async def create_completion(request: CompletionRequest, raw_request: Request) -> Response:
    """Continue a text or token ids; an event stream if `stream` is set."""
    serving: Serving = raw_request.app.state.serving
    refuse_unfused_completion(request)
    refuse_foreign_ids(request, serving.num_shared_ids)
    ask_for_weights(request)
    notice_unknown_fields(request)
    return await to_response(await serving.completion.create_completion(request, raw_request))
