"""GET /v1/models: the one model that is served, under each of its names."""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from ultrafuser.server.api.response import READ_ERRORS, error_responses
from ultrafuser.server.errors import ModelNotFound
from ultrafuser.server.serving.openapi import answer
from ultrafuser.server.serving.serving import Serving

router = APIRouter(responses=READ_ERRORS)


@router.get("/v1/models", responses=answer("/v1/models"))
async def list_models(raw_request: Request) -> Response:
    """Every name of the one model that is served."""
    return JSONResponse((await _models(raw_request)).model_dump())


@router.get("/v1/models/{name:path}", responses=error_responses(400, 404) | answer("/v1/models/{name:path}"))
async def retrieve_model(name: str, raw_request: Request) -> Response:
    """One name; 404 if it is not served."""
    for model in (await _models(raw_request)).data:
        if model.id == name:
            return JSONResponse(model.model_dump())
    raise ModelNotFound(f"The model `{name}` does not exist.", "model")


async def _models(raw_request: Request) -> Any:
    serving: Serving = raw_request.app.state.serving
    models = await serving.models.show_available_models()
    for model in models.data:
        model.owned_by = "ultrafuser"
        model.specialists = list(serving.specialists)
    return models
