"""From settings to a serving process and back: prepare, load, warm up, and end without leaving a process behind.

Importing this module imports vLLM. Everything that can be wrong without it was checked before (`server/__main__.py`).
"""

import asyncio
import logging
import platform
import signal
import socket
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import uvicorn
from pydantic import ValidationError
from vllm.platforms import current_platform
from vllm.tool_parsers import ToolParserManager
from vllm.version import __version__ as vllm_version

from gating.fusion import EngineSettings, FusionConfig, FusionError, inspect_fusion
from gating.gate import GateError
from gating.materialize import materialize
from server.api.health import Readiness
from server.app import create_app
from server.children import tied_children
from server.engine.client import FusedAsyncLLM
from server.engine.options import EngineOptionError, check_engine_options
from server.heads import MAX_HEAD_BYTES
from server.listener import base_url
from server.log import adopt_vllm_logging
from server.metrics import describe_build
from server.progress import StartupProgress
from server.serving import Serving, build_serving, warm_up
from server.settings import EngineStartError, ServerSettings, SettingsError

ENGINE_CHECK_SECONDS = 1.0
"""How often it is looked whether the engine still lives."""

ENGINE_STOP_SECONDS = 15.0
"""How long the engine's processes may take to end by themselves; then they are killed."""

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, an orchestrator's wish, a closed terminal."""

logger = logging.getLogger(__name__)


def serve(
    settings: ServerSettings,
    engine_options: Mapping[str, Any],
    fusion: FusionConfig,
    listener: socket.socket,
    progress: StartupProgress,
) -> int:
    """Serve until a signal comes; returns the process's exit status: 0 after a signal, 1 after an engine failure.

    Raises:
        SettingsError, FusionError, GateError, EngineOptionError: the user can put it right; no weights are loaded yet.
        EngineStartError: the engine's processes have said why.
        Whatever the caller's signal handlers raise before the server listens; the engine's processes have ended then.
    """
    progress.say(_versions())
    check_engine_options(engine_options)
    _check_tool_parser(settings.tool_call_parser or fusion.tool_call_parser, settings.enable_auto_tool_choice)
    fusion = _override_engine(fusion, engine_options)
    with progress.step("prepare weights"):
        fusion = materialize(fusion, Path(settings.cache) if settings.cache else None, progress.report)
        info = inspect_fusion(fusion)
    _log_configuration(settings, fusion, engine_options)
    # Before there is an event loop: while one runs, Ctrl-C would only be noticed after the weights are loaded.
    with progress.step("load all specialists into one engine"), tied_children():
        engine = _start_engine(fusion, engine_options)
    adopt_vllm_logging()  # not before: the engine's start configures vLLM's loggers anew
    try:
        serving = build_serving(engine, fusion, info, settings)
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            return runner.run(_Service(serving, settings, listener, progress).run())
    finally:
        engine.shutdown(timeout=ENGINE_STOP_SECONDS)


def _override_engine(fusion: FusionConfig, engine_options: Mapping[str, Any]) -> FusionConfig:
    """The fusion with the options in place of its file's engine settings, so that they are checked like these."""
    known = {name: value for name, value in engine_options.items() if name in EngineSettings.model_fields}
    return fusion.model_copy(update={"engine": fusion.engine.model_copy(update=known)})


def _start_engine(fusion: FusionConfig, engine_options: Mapping[str, Any]) -> FusedAsyncLLM:
    try:
        return FusedAsyncLLM.from_fusion(fusion, engine_options)
    except (FusionError, GateError, EngineOptionError):
        raise
    except ValueError as error:
        reason = (
            error.errors()[0]["msg"].removeprefix("Value error, ") if isinstance(error, ValidationError) else str(error)
        )
        raise EngineStartError(f"vLLM refuses the engine's configuration: {' '.join(reason.split())}") from error
    except RuntimeError as error:
        if "initialization failed" not in str(error):
            raise
        raise EngineStartError("the engine could not start; the first error above says why") from error


def _log_configuration(settings: ServerSettings, fusion: FusionConfig, engine_options: Mapping[str, Any]) -> None:
    """What is served and how; keys are secret and templates long."""
    logger.info("settings: %s", settings.model_dump(exclude={"api_key"}, exclude_defaults=True))
    logger.info("engine: %s", fusion.engine.model_dump(exclude_none=True) | dict(engine_options))
    logger.info("sampling defaults: %s", fusion.sampling_defaults.model_dump(exclude_none=True))
    for specialist in fusion.specialists:
        logger.info("specialist: %s", specialist.model_dump(exclude_none=True, exclude={"chat_template"}))


class _Service:
    """A loaded engine while it is served: warm-up, watching the engine, the end."""

    def __init__(
        self, serving: Serving, settings: ServerSettings, listener: socket.socket, progress: StartupProgress
    ) -> None:
        self._serving = serving
        self._settings = settings
        self._listener = listener
        self._progress = progress
        self._readiness = Readiness()
        self._engine_failed = False
        self._server = _Server(_uvicorn_config(create_app(serving, settings, self._readiness), settings))

    async def run(self) -> int:
        """Serve until asked to end; the exit status."""
        loop = asyncio.get_running_loop()
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, self._stop)
        companions = [asyncio.create_task(self._watch_engine()), asyncio.create_task(self._become_ready())]
        try:
            await self._server.serve(sockets=[self._listener])
        finally:
            for task in companions:
                task.cancel()
        results = await asyncio.gather(*companions, return_exceptions=True)
        failures = [result for result in results if isinstance(result, Exception)]
        for failure in failures:
            logger.error("the server ended because of", exc_info=failure)
        return 1 if failures or self._engine_failed else 0

    async def _become_ready(self) -> None:
        try:
            with self._progress.step("generate a first token"):
                await warm_up(self._serving)
        except Exception:
            self._stop()
            raise
        self._readiness.is_warm = True
        name = self._serving.models.model_name()
        describe_build(name, len(self._serving.specialists), vllm_version)
        self._progress.say(f"ready: {base_url(self._settings, self._listener)}/v1  model {name}")

    async def _watch_engine(self) -> None:
        """An engine that has stopped answers nothing more: end, so that whoever runs the server starts a new one."""
        while not self._serving.engine.errored:
            await asyncio.sleep(ENGINE_CHECK_SECONDS)
        logger.error("the engine has stopped; the server ends")
        self._engine_failed = True
        self._stop()

    def _stop(self) -> None:
        """End when the running requests have ended; asked again, at once."""
        self._readiness.is_ending = True
        self._server.force_exit = self._server.should_exit
        self._server.should_exit = True


class _Server(uvicorn.Server):
    """uvicorn without its signal handling: it would raise the signal again at its end and decide the exit status."""

    def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override]
        """Nothing: the service's own handlers are on the loop."""
        return nullcontext()


def _uvicorn_config(app: Any, settings: ServerSettings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=settings.shutdown_timeout,  # type: ignore[arg-type]
        ssl_certfile=settings.ssl_certfile,
        ssl_keyfile=settings.ssl_keyfile,
        http="h11",  # the other parser that uvicorn knows reads headers without end
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
    )


def _check_tool_parser(name: str | None, enable_auto: bool | None) -> None:
    parsers = ToolParserManager.list_registered()
    if name is not None and name not in parsers:
        raise SettingsError(f"tool_call_parser: vLLM has no parser {name!r}; it has {', '.join(parsers)}")
    if enable_auto and name is None:
        raise SettingsError("--enable-auto-tool-choice: there is no parser; name one with --tool-call-parser")


def _versions() -> str:
    device = current_platform.get_device_name() if current_platform.is_cuda() else current_platform.device_type
    return f"vLLM {vllm_version}, torch {torch.__version__}, Python {platform.python_version()}, device {device}"


def _loop_factory() -> Any:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop
