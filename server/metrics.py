"""Our own Prometheus metrics, beside vLLM's `vllm:*` and the `http_*` of the web framework; all in one registry.

Only numbers of the API process: what happens in the engine is counted by vLLM. Labels are bounded: no label ever holds
what a client sent.
"""

from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST, Counter, Gauge, generate_latest
from prometheus_fastapi_instrumentator import Instrumentator
from starlette.responses import Response
from vllm.v1.metrics.prometheus import get_prometheus_registry

from server import __version__

BUILD_INFO = Gauge(
    "fused_build_info", "Always 1; its labels say what is served by what.", ["version", "vllm_version", "model_name"]
)
READY = Gauge("fused_ready", "1 while the server can generate: a token was produced, the engine lives, no shutdown.")
SPECIALISTS = Gauge("fused_specialists", "Number of specialists that are fused.", ["model_name"])
REFUSED = Counter("fused_refused_requests", "Requests that asked for what is not fused, by field.", ["param"])
REJECTIONS = Counter("fused_rejections", "Requests that were turned away before they were looked at.", ["reason"])
DISCONNECTS = Counter("fused_client_disconnects", "Requests whose client left before the response was complete.")

_UNCOUNTED = ["/metrics", "/health", "/ready", "/version"]


def describe_build(model_name: str, num_specialists: int, vllm_version: str) -> None:
    """Set the metrics that do not change while the server runs."""
    BUILD_INFO.labels(__version__, vllm_version, model_name).set(1)
    SPECIALISTS.labels(model_name).set(num_specialists)


def count_http_requests(app: FastAPI) -> None:
    """Add vLLM's `http_requests_total` and the request durations to the registry."""
    Instrumentator(excluded_handlers=_UNCOUNTED, registry=get_prometheus_registry()).add().instrument(app)


def scrape() -> Response:
    """Everything in the registry, in Prometheus' text format."""
    return Response(generate_latest(get_prometheus_registry()), media_type=CONTENT_TYPE_LATEST)
