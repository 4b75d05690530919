"""From settings to a serving process and back: prepare, load, warm up, and end without leaving a process behind.

Importing this module imports vLLM. Everything that can be wrong without it was checked before (`server/__main__.py`).
"""

import asyncio
import logging
import signal
import socket
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import uvicorn
from pydantic import ValidationError

from ultrafuser.gating.errors import UserError
from ultrafuser.gating.model.fusion import FusionConfig
from ultrafuser.gating.model.gate_file import gate_digest
from ultrafuser.server.access.admission import Admission, default_max_requests
from ultrafuser.server.access.connections import guarded_protocol
from ultrafuser.server.app import create_app
from ultrafuser.server.engine.client.async_llm import FusedAsyncLLM
from ultrafuser.server.engine.shared.node import Node
from ultrafuser.server.engine.shared.ray_cluster import RayPlacement, check_ray
from ultrafuser.server.errors import EngineDead
from ultrafuser.server.health import Heartbeat, Readiness, StallWatch
from ultrafuser.server.log import adopt_vllm_logging
from ultrafuser.server.metrics import describe_build
from ultrafuser.server.serving.installation import VLLM_VERSION
from ultrafuser.server.serving.serving import Serving, build_serving, warm_up
from ultrafuser.server.serving.step_metrics import StepMetrics
from ultrafuser.server.settings import EngineStartError, ServerSettings
from ultrafuser.server.start.children import tied_children
from ultrafuser.server.start.leading import Followers, gather
from ultrafuser.server.start.listener import MeetingPoints, base_url
from ultrafuser.server.start.preparing import Prepared, prepare
from ultrafuser.server.start.progress import StartupProgress
from ultrafuser.server.start.ray_meeting import meet_ray
from ultrafuser.server.start.signals import at_stop_signals

ENGINE_CHECK_SECONDS = 1.0
"""How often it is looked whether the engine still lives."""

ENGINE_FAILED_SECONDS = 1.0
"""How long a server whose engine has stopped still answers: running requests and probes learn why."""

KEEP_ALIVE_SECONDS = 75
"""How long an idle connection is kept: longer than balancers keep theirs (60 s), or one would send a request on a
connection that is just being closed."""

LAST_WORDS_SECONDS = 3
"""How long it may take to tell the clients of requests that were ended."""

ENGINE_STOP_SECONDS = 8.0
"""How long the engine's processes may take to end by themselves; then they are killed."""

logger = logging.getLogger(__name__)


def serve(
    settings: ServerSettings,
    engine_options: Mapping[str, Any],
    fusion: FusionConfig,
    listener: socket.socket,
    progress: StartupProgress,
    points: MeetingPoints | None = None,
) -> int:
    """Serve until a signal comes; returns the process's exit status: 0 after a signal, 1 after an engine failure.

    `points` is where the other nodes come to, if there are any.

    Raises:
        SettingsError, FusionError, GateError, EngineOptionError: the user can put it right; no weights are loaded yet.
        EngineStartError: the engine's processes have said why.
        Whatever the caller's signal handlers raise before the server listens; the engine's processes have ended then.
    """
    prepared = prepare(settings, engine_options, fusion, progress)
    with gather(settings.node_timeout, prepared, points, progress) if points else nullcontext() as followers:
        with loaded(settings, engine_options, prepared, progress) as serving:
            ends_at_a_stall = followers is not None or can_hang(prepared)
            with asyncio.Runner(loop_factory=_loop_factory()) as runner:
                status = runner.run(_Service(serving, settings, listener, progress, followers, ends_at_a_stall).run())
        if followers is not None and status == 0:
            followers.dismiss()
        return status


@contextmanager
def loaded(
    settings: ServerSettings, engine_options: Mapping[str, Any], prepared: Prepared, progress: StartupProgress
) -> Iterator[Serving]:
    """The serving classes over an engine of their own, which ends with the context.

    Raises:
        EngineOptionError, EngineStartError: as `serve`.
    """
    fusion = prepared.fusion
    ray = meet_ray(settings, prepared, progress) if check_ray(prepared.written) else None
    # Before there is an event loop: while one runs, Ctrl-C would only be noticed after the weights are loaded.
    with progress.step("load all specialists into one engine"), tied_children():
        engine = _start_engine(fusion, engine_options, prepared.node or ray)
    try:
        adopt_vllm_logging()  # not before: the engine's start configures vLLM's loggers anew
        engine.steps.listen(StepMetrics(fusion.specialist_names).record)
        serving = build_serving(engine, fusion, prepared.info, settings)
        describe_build(serving.models.model_name(), len(fusion.specialists), VLLM_VERSION, gate_digest(fusion.gate))
        yield serving
    finally:
        engine.shutdown(timeout=ENGINE_STOP_SECONDS)


def can_hang(prepared: Prepared) -> bool:
    """Whether the engine of one command can stand still for good: ranks that wait for one that does not answer, and be
    it on a machine that cannot be reached, go on waiting."""
    return prepared.fusion.engine.placement == "split" or check_ray(prepared.written)


def most_requests(serving: Serving) -> int:
    """Unfinished requests that the engine takes at a time."""
    scheduling = serving.engine.vllm_config.scheduler_config
    limit = scheduling.max_num_queued_reqs
    return default_max_requests(scheduling.max_num_seqs) if limit is None else limit


def _start_engine(
    fusion: FusionConfig, engine_options: Mapping[str, Any], node: Node | RayPlacement | None
) -> FusedAsyncLLM:
    try:
        return FusedAsyncLLM.from_fusion(fusion, engine_options, node)
    except UserError:
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


class _Service:
    """A loaded engine while it is served: warm-up, watching the engine, the end."""

    def __init__(
        self,
        serving: Serving,
        settings: ServerSettings,
        listener: socket.socket,
        progress: StartupProgress,
        followers: Followers | None,
        ends_at_a_stall: bool,
    ) -> None:
        engine = serving.engine
        self._serving = serving
        self._settings = settings
        self._listener = listener
        self._url = base_url(settings, listener)  # while it can say: at the end uvicorn closes the listener
        self._progress = progress
        self._followers = followers
        self._readiness = Readiness()
        self._ends_at_a_stall = ends_at_a_stall
        self._engine_failed = self._is_asked = False
        self._admission = Admission(most_requests(serving))
        heartbeat = Heartbeat()
        engine.steps.listen(heartbeat.beat)
        self._stall_watch = StallWatch(engine, heartbeat, self._readiness, settings.stall_timeout)
        app = create_app(serving, settings, self._readiness, self._admission)
        self._server = _Server(_uvicorn_config(app, settings))
        self._companions: list[asyncio.Task[None]] = []

    async def run(self) -> int:
        """Serve until asked to end; the exit status."""
        loop = asyncio.get_running_loop()
        # Not the loop's own handlers: it would give the signals back to Python when it closes, with the engine to end.
        at_stop_signals(lambda *_: loop.call_soon_threadsafe(self._stop))
        if self._followers is not None:
            self._followers.at_wish(lambda: loop.call_soon_threadsafe(self._end_in_order))
        self._accompany(self._watch_engine(), self._become_ready(), self._stall_watch.run())
        try:
            await self._server.serve(sockets=[self._listener])
        finally:
            at_stop_signals(signal.SIG_IGN)
            for task in self._companions:
                task.cancel()
            self._accompany(self._serving.grammars.close())
            ended, _ = await asyncio.wait(self._companions, timeout=LAST_WORDS_SECONDS)
            if self._is_lost:
                self._serving.engine.shutdown(timeout=0)  # it heeds nothing
        failures = [failure for task in ended if not task.cancelled() and (failure := task.exception())]
        for failure in failures:
            logger.error("the server ended because of", exc_info=failure)
        return 1 if failures or self._engine_failed else 0

    async def _become_ready(self) -> None:
        try:
            with self._progress.step("generate a first token"):
                await warm_up(self._serving)
        except Exception:
            if self._readiness.is_ending:
                return  # vLLM answers a request that the end has cancelled with an error
            self._stop()
            raise
        if not self._readiness.is_ending:
            self._readiness.is_warm = True
            self._progress.say(f"ready: {self._url}/v1  model {self._serving.models.model_name()}")

    async def _watch_engine(self) -> None:
        """An engine that has stopped answers nothing more: end, so that whoever runs the server starts a new one."""
        while not (self._serving.engine.errored or self._is_lost):
            await asyncio.sleep(ENGINE_CHECK_SECONDS)
        logger.error("the engine has stopped; the server ends")
        self._engine_failed = True
        if self._is_lost:
            self._admission.end_all(EngineDead())
        await asyncio.sleep(ENGINE_FAILED_SECONDS)
        await self._end_after(0)

    @property
    def _is_lost(self) -> bool:
        """Whether the engine hangs for good."""
        return self._ends_at_a_stall and self._stall_watch.is_lost

    def _stop(self) -> None:
        """End when the running requests have ended; asked again, at once."""
        if self._is_asked:
            self._admission.end_all()
            self._server.should_exit = self._server.force_exit = True
        self._is_asked = True
        self._end_in_order()

    def _end_in_order(self) -> None:
        """As other nodes wish, any number of them: a signal to all machines at once cuts nobody off."""
        if not self._readiness.is_ending:
            self._readiness.is_ending = True
            self._accompany(self._drain())

    async def _drain(self) -> None:
        """Let balancers see that the server is not ready, before anybody is turned away."""
        if delay := self._settings.shutdown_delay:
            logger.info("the server ends; it is not ready, and takes requests for %g s more", delay)
            await asyncio.sleep(delay)
        await self._end_after(self._settings.shutdown_timeout)

    async def _end_after(self, seconds: float) -> None:
        """Take no more requests, give the running ones so long, then tell their clients, and end."""
        logger.info("the server ends; %d running requests get %g s", self._admission.num_running, seconds)
        if not await self._admission.drain(seconds):
            self._admission.end_all()
            await self._admission.drain(LAST_WORDS_SECONDS)
        self._server.should_exit = True

    def _accompany(self, *tasks: Coroutine[Any, Any, None]) -> None:
        self._companions += [asyncio.create_task(task) for task in tasks]


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
        ws="none",
        lifespan="off",  # when it is told to end at once uvicorn cancels one, and prints the traceback
        http=guarded_protocol(settings.read_timeout, settings.write_timeout),
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=LAST_WORDS_SECONDS,  # of responses that are complete already
        ssl_certfile=settings.ssl_certfile,
        ssl_keyfile=settings.ssl_keyfile,
    )


def _loop_factory() -> Any:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop
