"""GET /health (alive), /ready (can generate), /version and /metrics: what machines ask."""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel

from ultrafuser import __version__
from ultrafuser.server.api.response import READ_ERRORS
from ultrafuser.server.health import Readiness
from ultrafuser.server.metrics import DRAINING, ENGINE_UP, READY, UNFINISHED, scrape
from ultrafuser.server.serving.installation import VLLM_VERSION
from ultrafuser.server.serving.serving import Serving

router = APIRouter(responses=READ_ERRORS)


class Status(BaseModel):
    """What a probe is told."""

    status: str


_STATUSES: dict[int | str, dict[str, Any]] = {200: {"model": Status}, 503: {"model": Status}}


@router.get("/health", responses=_STATUSES)
async def health(raw_request: Request) -> Response:
    """200 while the engine lives, else 503: a liveness probe, which restarts a server whose engine has stopped."""
    serving: Serving = raw_request.app.state.serving
    alive = not serving.engine.errored
    return JSONResponse({"status": "alive" if alive else "engine stopped"}, 200 if alive else 503)


@router.get("/ready", responses=_STATUSES)
async def ready(raw_request: Request) -> Response:
    """200 once a token was produced and until the server ends, else 503: a readiness probe, which routes traffic."""
    obstacle = _obstacle(raw_request)
    return JSONResponse({"status": obstacle or "ready"}, 503 if obstacle else 200)


@router.get("/version")
async def version() -> Response:
    """Versions of UltraFuser and of the vLLM it runs on."""
    return JSONResponse({"version": __version__, "vllm_version": VLLM_VERSION})


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(raw_request: Request) -> Response:
    """Prometheus metrics: `vllm:*`, `http_*` and our `fused_*`; the server's state is looked up only now."""
    engine = raw_request.app.state.serving.engine
    READY.set(_obstacle(raw_request) is None)
    ENGINE_UP.set(not engine.errored)
    DRAINING.set(raw_request.app.state.readiness.is_ending)
    UNFINISHED.set(engine.get_num_unfinished_requests())
    return scrape()


def _obstacle(raw_request: Request) -> str | None:
    serving: Serving = raw_request.app.state.serving
    readiness: Readiness = raw_request.app.state.readiness
    return readiness.obstacle(serving.engine.errored)
