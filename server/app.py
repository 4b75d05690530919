"""The HTTP application: routes, error handlers, middleware. Knows the serving classes, starts nothing."""

from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from ultrafuser import __version__
from ultrafuser.server.access.admission import Admission, AdmissionControl
from ultrafuser.server.access.keys import KeyRing
from ultrafuser.server.access.middleware import (
    PROBE_PATHS,
    ApiKeys,
    Head,
    HeaderCount,
    HostHeader,
    RequestLog,
    TrustedHosts,
)
from ultrafuser.server.access.quotas import Quota
from ultrafuser.server.api import analyze, chat, completions, messages, models, probes, responses_api, tokenize
from ultrafuser.server.api.playground import FILES, playground_router
from ultrafuser.server.api.response import answer_error
from ultrafuser.server.health import Readiness
from ultrafuser.server.metrics import count_http_requests
from ultrafuser.server.serving.openapi import describe
from ultrafuser.server.serving.serving import Serving
from ultrafuser.server.serving.translation import TRANSLATED_ERRORS
from ultrafuser.server.settings import ServerSettings

ROUTERS = tuple(
    module.router for module in (chat, completions, messages, responses_api, analyze, models, tokenize, probes)
)

PUBLIC_PATHS = PROBE_PATHS | FILES.keys()
"""Paths that need no key and are never turned away: there is nothing secret in the playground's files."""


def create_app(
    serving: Serving, settings: ServerSettings, readiness: Readiness, admission: Admission | None = None
) -> FastAPI:
    """The application over a running engine; `readiness` is what `/ready` reports, kept up to date by its owner, who
    also ends requests through `admission`."""
    app = FastAPI(
        title="UltraFuser",
        version=__version__,
        root_path=settings.root_path,
        redirect_slashes=False,  # a redirect would be an answer without OpenAI's error body
        docs_url=None,  # these two load scripts from elsewhere; /openapi.json stays
        redoc_url=None,
    )
    app.state.serving = serving
    app.state.readiness = readiness
    app.state.keep_alive_interval = settings.keep_alive_interval
    app.state.bounds = serving.bounds
    app.openapi = lambda: describe(app)  # type: ignore[method-assign]
    for router in ROUTERS:
        app.include_router(router)
    if settings.playground:
        app.include_router(playground_router())
    for error in TRANSLATED_ERRORS:
        app.add_exception_handler(error, answer_error)
    _add_middleware(app, settings, admission or Admission())
    return app


def _add_middleware(app: FastAPI, settings: ServerSettings, admission: Admission) -> None:
    """From the inside out: HEAD, admission, keys, request counts (of refused ones, too), hosts, headers, CORS (whose
    preflights carry no key), log."""
    app.add_middleware(Head)
    public: dict[str, Any] = {"public_paths": PUBLIC_PATHS}
    app.add_middleware(AdmissionControl, admission=admission, timeout_seconds=settings.request_timeout, **public)
    if settings.api_key:
        quotas = [Quota(settings.requests_per_minute, settings.concurrent_requests) for _ in settings.api_key]
        salts_cache = settings.cache_salt_per_key
        app.add_middleware(ApiKeys, keys=KeyRing(settings.api_key), quotas=quotas, salts_cache=salts_cache, **public)
    count_http_requests(app)
    if settings.allowed_host:
        app.add_middleware(TrustedHosts, hosts=settings.allowed_host, **public)
    app.add_middleware(HostHeader)
    app.add_middleware(HeaderCount)
    if settings.allowed_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origin,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "request-id", "x-should-retry", "retry-after"],
        )
    app.add_middleware(RequestLog, quiet_paths=PUBLIC_PATHS | {"/version"})
