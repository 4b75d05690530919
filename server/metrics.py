"""Our own Prometheus metrics, beside vLLM's `vllm:*` and the `http_*` of the web framework; all in one registry.

What the engine's steps report is counted in `server/serving/step_metrics.py`, the rest in the API process. Labels are
bounded: no label ever holds what a client sent.
"""

from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, Counter, Gauge, generate_latest
from prometheus_fastapi_instrumentator import Instrumentator
from starlette.responses import Response

from ultrafuser import __version__

BUILD_INFO = Gauge(
    "fused_build_info",
    "Always 1; its labels say what is served by what, and with which gate.",
    ["version", "vllm_version", "model_name", "gate_sha256"],
)
READY = Gauge("fused_ready", "1 while the server can generate: a token was produced, the engine lives, no shutdown.")
ENGINE_UP = Gauge("fused_engine_up", "1 while the engine's processes live.")
DRAINING = Gauge("fused_draining", "1 from the signal that ends the server: running requests finish, none is taken.")
UNFINISHED = Gauge(
    "fused_unfinished_requests",
    "Requests that the engine has not finished; counted where they are sent from, so also while it hangs.",
)
SPECIALISTS = Gauge("fused_specialists", "Number of specialists that are fused.", ["model_name"])
REFUSED = Counter("fused_refused_requests", "Requests that asked for what is not fused, by field.", ["param"])
REJECTIONS = Counter("fused_rejections", "Requests that were turned away before they were looked at.", ["reason"])
DISCONNECTS = Counter("fused_client_disconnects", "Requests whose client left before the response was complete.")

_UNCOUNTED = ["/metrics", "/health", "/ready", "/version"]


def describe_build(model_name: str, num_specialists: int, vllm_version: str, gate_sha256: str) -> None:
    """Set the metrics that do not change while the server runs."""
    BUILD_INFO.labels(__version__, vllm_version, model_name, gate_sha256).set(1)
    SPECIALISTS.labels(model_name).set(num_specialists)


def count_http_requests(app: FastAPI) -> None:
    """Add vLLM's `http_requests_total` and the request durations to the registry."""
    Instrumentator(excluded_handlers=_UNCOUNTED, registry=REGISTRY).add().instrument(app)


def scrape() -> Response:
    """Everything in the registry, in Prometheus' text format."""
    return Response(generate_latest(REGISTRY), media_type=CONTENT_TYPE_LATEST)
