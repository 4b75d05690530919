"""The engine and the application that answer a batch, in this process: the server's own, without a port.

Importing this module imports vLLM.
"""

import asyncio
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, NoReturn

from ultrafuser.gating.model.fusion import FusionConfig
from ultrafuser.server.access.admission import Admission
from ultrafuser.server.app import create_app
from ultrafuser.server.batch.lines import BatchRequest
from ultrafuser.server.batch.sending import Sending
from ultrafuser.server.health import Heartbeat, Readiness, StallWatch
from ultrafuser.server.serving.serving import Serving
from ultrafuser.server.settings import EngineStartError, ServerSettings
from ultrafuser.server.start.launch import ENGINE_CHECK_SECONDS, can_hang, loaded, most_requests
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
            runner.run(_answer(serving, settings, requests, write, can_hang(prepared)))
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None


async def _answer(
    serving: Serving,
    settings: ServerSettings,
    requests: Iterator[BatchRequest],
    write: Callable[[dict[str, Any]], None],
    ends_at_a_stall: bool,
) -> None:
    loop, work = asyncio.get_running_loop(), asyncio.current_task()
    assert work is not None
    at_stop_signals(lambda *_: loop.call_soon_threadsafe(work.cancel))
    most, readiness = most_requests(serving), Readiness()
    watch = _watch(serving, readiness, settings.stall_timeout)
    app = create_app(serving, settings, readiness, Admission(most))
    sending = asyncio.ensure_future(Sending(app, requests, write, lambda: serving.engine.errored).run(most))
    lost = asyncio.ensure_future(_until_lost(watch, ends_at_a_stall))
    tasks = (sending, lost, asyncio.ensure_future(watch.run()))
    try:
        ended, _ = await asyncio.wait((sending, lost), return_when=asyncio.FIRST_COMPLETED)
        for task in ended:
            task.result()
    finally:
        at_stop_signals(signal.SIG_IGN)  # the engine is about to end, and takes a moment
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await serving.grammars.close()


def _watch(serving: Serving, readiness: Readiness, stall_seconds: float) -> StallWatch:
    heartbeat = Heartbeat()

    def beat(report: object) -> None:
        heartbeat.beat(report)
        readiness.is_warm = True

    serving.engine.steps.listen(beat)
    return StallWatch(serving.engine, heartbeat, readiness, stall_seconds)


async def _until_lost(watch: StallWatch, ends_at_a_stall: bool) -> NoReturn:
    """An engine that hangs for good answers nothing more."""
    while not (ends_at_a_stall and watch.is_lost):
        await asyncio.sleep(ENGINE_CHECK_SECONDS)
    raise EngineStartError("the engine hangs: its ranks wait for one another; the same command with --resume goes on")
