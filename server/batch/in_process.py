"""The engine and the application that answer a batch, in this process: the server's own, without a port.

Importing this module imports vLLM.
"""

import asyncio
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

from ultrafuser.gating.model.fusion import FusionConfig
from ultrafuser.server.access.admission import Admission
from ultrafuser.server.app import create_app
from ultrafuser.server.batch.lines import BatchRequest
from ultrafuser.server.batch.sending import Sending
from ultrafuser.server.health import Readiness
from ultrafuser.server.serving.serving import Serving
from ultrafuser.server.settings import ServerSettings
from ultrafuser.server.start.launch import loaded, most_requests
from ultrafuser.server.start.preparing import prepare
from ultrafuser.server.start.progress import StartupProgress
from ultrafuser.server.start.signals import at_stop_signals


def answer_requests(
    settings: ServerSettings,
    engine_options: Mapping[str, Any],
    fusion: FusionConfig,
    progress: StartupProgress,
    requests: Iterator[BatchRequest],
    answers: AbstractContextManager[Callable[[dict[str, Any]], None]],
) -> None:
    """Load the engine, answer all requests, end it. `answers` is entered when the engine is there, and writes a line.

    Raises:
        SettingsError, FusionError, GateError, EngineOptionError: the user can put it right; no weights are loaded yet.
        EngineStartError: the engine failed.
        KeyboardInterrupt: a signal came.
    """
    prepared = prepare(settings, engine_options, fusion, progress)
    with loaded(settings, engine_options, prepared, progress) as serving, answers as write, asyncio.Runner() as runner:
        try:
            runner.run(_answer(serving, settings, requests, write))
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None


async def _answer(
    serving: Serving,
    settings: ServerSettings,
    requests: Iterator[BatchRequest],
    write: Callable[[dict[str, Any]], None],
) -> None:
    loop, work = asyncio.get_running_loop(), asyncio.current_task()
    assert work is not None
    at_stop_signals(lambda *_: loop.call_soon_threadsafe(work.cancel))
    most = most_requests(serving)
    app = create_app(serving, settings, Readiness(is_warm=True), Admission(most))
    try:
        await Sending(app, requests, write, lambda: serving.engine.errored).run(most)
    finally:
        at_stop_signals(signal.SIG_IGN)  # the engine is about to end, and takes a moment
        await serving.grammars.close()
