"""A signal ends the server with status 0 and without a traceback, whatever it is doing; an engine's failure with 1."""

import asyncio
import io
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import uvloop
from vllm.v1.engine.exceptions import EngineDeadError

from tests.server.scripted import ScriptedEngine
from ultrafuser.gating.model.fusion import FusionConfig
from ultrafuser.server import health
from ultrafuser.server.health import Readiness
from ultrafuser.server.requests.grammars import GrammarCheck
from ultrafuser.server.serving.serving import Serving, warm_up
from ultrafuser.server.settings import ServerSettings
from ultrafuser.server.start import launch
from ultrafuser.server.start.listener import listen_on
from ultrafuser.server.start.progress import StartupProgress
from ultrafuser.server.start.signals import STOP_SIGNALS

# vLLM's own request model marks OpenAI's older spelling as deprecated and then reads it itself.
pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated:DeprecationWarning")


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


class Engine(ScriptedEngine):
    """`before_tokens` and `before_end` run before a request's first token, and before its end."""

    def __init__(self, vllm_config: Any) -> None:
        super().__init__(vllm_config)
        self.steps = SimpleNamespace(listen=lambda _listener: None)
        self.before_tokens: Callable[[], Awaitable[Any]] = lambda: asyncio.sleep(0)
        self.before_end: Callable[[], None] = lambda: None
        self.num_ended = 0
        self.is_paused: Callable[[], Awaitable[Any]] = lambda: asyncio.sleep(0)

    async def generate(self, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        await self.before_tokens()
        async for output in super().generate(*args, **kwargs):
            yield output

    def shutdown(self, timeout: float) -> None:
        self.before_end()
        self.num_ended += 1


class Start:
    """Serves with a scripted engine; `listener` is the server's, `said` is what the user sees; `num_closed` counts the
    ends of the process that tries constraints out."""

    def __init__(self, engine: Engine, fusion: FusionConfig) -> None:
        self.engine = engine
        self.listener = listen_on("127.0.0.1", 0)
        self.num_closed = 0
        self.settings = ServerSettings()
        self.fusion = fusion
        self._screen = io.StringIO()

    @property
    def said(self) -> str:
        return self._screen.getvalue()

    async def close_grammars(self) -> None:
        self.num_closed += 1

    def serve(self) -> int:
        return launch.serve(self.settings, {}, self.fusion, self.listener, StartupProgress(4, self._screen))


@pytest.fixture
def engine(vllm_config: Any) -> Engine:
    return Engine(vllm_config)


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def start(
    request: pytest.FixtureRequest, engine: Engine, fusion: FusionConfig, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Start]:
    """The process's signals and vLLM's logging stay as they are."""
    monkeypatch.setattr(launch, "_start_engine", lambda *_: engine)
    monkeypatch.setattr(launch, "_loop_factory", lambda: request.param)
    monkeypatch.setattr(launch, "adopt_vllm_logging", lambda: None)
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    start = Start(engine, fusion)
    monkeypatch.setattr(GrammarCheck, "close", lambda _: start.close_grammars())
    yield start
    start.listener.close()
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def after_first_token(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Awaitable[Any]]], None]:
    """Sets what happens between the first token and the word that the server is ready."""

    def set_action(action: Callable[[], Awaitable[Any]]) -> None:
        async def warm_up_and_act(serving: Serving) -> None:
            await warm_up(serving)
            await action()

        monkeypatch.setattr(launch, "warm_up", warm_up_and_act)

    return set_action


def check_a_clean_end(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    assert start.serve() == 0
    assert start.engine.num_ended == start.num_closed == 1
    assert start.listener.fileno() == -1
    assert "ready: " not in start.said
    assert [record for record in caplog.records if record.levelname == "ERROR" or record.exc_info] == []


def test_a_signal_between_the_first_token_and_ready(
    start: Start, after_first_token: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    """The address was asked of the listener, which had been closed meanwhile: a traceback and status 1."""

    async def end_the_server() -> None:
        press_ctrl_c()
        while start.listener.fileno() != -1:
            await asyncio.sleep(0)

    after_first_token(end_the_server)
    check_a_clean_end(start, caplog)


@pytest.mark.parametrize("num_signals", [1, 3])
def test_a_signal_while_the_first_token_is_generated(
    start: Start, caplog: pytest.LogCaptureFixture, num_signals: int
) -> None:
    """vLLM makes an error response of a cancelled request: it was taken for a failure of the engine, status 1."""

    async def never() -> None:
        for _ in range(num_signals):
            press_ctrl_c()
            await asyncio.sleep(0.01)
        await asyncio.Event().wait()

    start.engine.before_tokens = never
    check_a_clean_end(start, caplog)


def test_a_signal_before_anybody_is_accepted(
    start: Start, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept = launch._Server.startup

    async def signalled(*args: Any, **kwargs: Any) -> None:
        press_ctrl_c()
        await asyncio.sleep(0.01)
        await accept(*args, **kwargs)

    monkeypatch.setattr(launch._Server, "startup", signalled)
    start.engine.before_tokens = asyncio.Event().wait
    check_a_clean_end(start, caplog)


def test_signals_while_the_engine_ends_change_nothing(
    start: Start, after_first_token: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    """The event loop, when it closed, gave the signals back to Python: KeyboardInterrupt, and the engine was left."""

    async def end_the_server() -> None:
        press_ctrl_c()
        await asyncio.Event().wait()

    after_first_token(end_the_server)
    start.engine.before_end = press_ctrl_c
    check_a_clean_end(start, caplog)


def test_a_server_that_became_ready_says_where_and_ends_at_a_signal(
    start: Start, after_first_token: Callable[..., None]
) -> None:
    port = start.listener.getsockname()[1]

    async def end_later() -> None:
        asyncio.get_running_loop().call_later(0.2, press_ctrl_c)

    after_first_token(end_later)
    assert start.serve() == 0
    assert f"ready: http://127.0.0.1:{port}/v1  model tiny\n" in start.said


def test_an_engine_that_fails_in_the_warm_up_ends_the_server(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    start.engine.failure = EngineDeadError()
    assert start.serve() == 1
    assert start.engine.num_ended == 1
    assert "ready: " not in start.said
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == [
        "the server ended because of"
    ]


@pytest.mark.parametrize("start", [asyncio.new_event_loop], indirect=True)
@pytest.mark.parametrize(("placement", "status"), [("split", 1), ("shared", 0)])
def test_an_engine_that_stalls_ends_the_server_where_ranks_wait_for_others(
    start: Start, after_first_token: Callable[..., None], placement: str, status: int
) -> None:
    async def stall() -> None:
        start.engine.num_unfinished = 1
        start.engine.is_paused = asyncio.Event().wait
        asyncio.get_running_loop().call_later(3.0, press_ctrl_c)

    after_first_token(stall)
    start.settings = ServerSettings(stall_timeout=0.2)
    engine = start.fusion.engine.model_copy(update={"placement": placement})
    start.fusion = start.fusion.model_copy(update={"engine": engine})
    assert start.serve() == status


@pytest.mark.parametrize("start", [asyncio.new_event_loop], indirect=True)
def test_ranks_that_hang_at_the_first_token_end_the_start(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    async def hang(_: Serving) -> None:
        start.engine.num_unfinished = 1
        start.engine.is_paused = asyncio.Event().wait
        asyncio.get_running_loop().call_later(20.0, press_ctrl_c)
        await asyncio.Event().wait()

    monkeypatch.setattr(launch, "warm_up", hang)
    monkeypatch.setattr(health, "FIRST_STEP_STALLS", 3)
    start.settings = ServerSettings(stall_timeout=0.2)
    engine = start.fusion.engine.model_copy(update={"placement": "split"})
    start.fusion = start.fusion.model_copy(update={"engine": engine})
    assert start.serve() == 1
    assert "ready: " not in start.said


def test_wishes_of_other_nodes_cut_nobody_off() -> None:
    """Stopped all at once, every node tells the first, which has a signal of its own, before or after."""
    service = launch._Service.__new__(launch._Service)
    service._is_asked, service._readiness, service._settings = False, Readiness(), ServerSettings()
    service._server = server = mock.Mock(force_exit=False)
    service._admission, ends = mock.Mock(), list[Any]()
    drain = lambda: service._settings.shutdown_timeout  # noqa: E731
    with mock.patch.multiple(service, _drain=drain, _accompany=ends.append):
        for end in (service._end_in_order, service._stop, service._end_in_order):
            end()
        assert not server.force_exit
        assert ends == [service._settings.shutdown_timeout]
        service._stop()
        assert server.force_exit
        service._admission.end_all.assert_called_once_with()


def test_idle_connections_outlive_those_of_balancers() -> None:
    """uvicorn's 5 s are shorter than what balancers keep: they would send requests on connections that are closing."""
    config = launch._uvicorn_config(mock.Mock(), ServerSettings())
    assert config.timeout_keep_alive > 60
