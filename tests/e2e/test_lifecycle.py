"""The end of a server: requests finish, the exit status is right, and no process stays behind."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.clients import Listener
from tests.e2e.process import STOP_SECONDS, ServerProcess, wait_for

pytestmark = pytest.mark.slow


@pytest.fixture
def start(tiny_fusion: Path, tmp_path: Path) -> Iterator[Callable[..., ServerProcess]]:
    """Starts servers, and sees to it that none outlives the test."""
    servers: list[ServerProcess] = []

    def start(*options: str) -> ServerProcess:
        servers.append(ServerProcess(tiny_fusion, tmp_path / f"log{len(servers)}", *options))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


def press_ctrl_c(server: ServerProcess) -> None:
    """As in a terminal: every process of the group gets the signal, not the server alone."""
    os.killpg(server.process.pid, signal.SIGINT)


def test_at_ctrl_c_running_requests_finish_and_nothing_is_left_behind(start: Callable[..., ServerProcess]) -> None:
    server = start("--shutdown-delay", "5", "--shutdown-timeout", "60")
    server.wait_until_ready()
    listener = Listener(server.url, max_tokens=900)
    assert len(server.children()) >= 2
    press_ctrl_c(server)
    wait_for(lambda: httpx.get(f"{server.url}/ready").json() == {"status": "shutting down"}, "/ready says so", 2)
    assert httpx.get(f"{server.url}/health").status_code == 200
    url, body = f"{server.url}/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    assert httpx.post(url, json=body).status_code == 200  # a balancer may not have noticed
    wait_for(lambda: httpx.post(url, json=body).status_code == 503, "requests are refused", 10)
    refused = httpx.post(url, json={"messages": []})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
    assert "retry-after" in refused.headers
    assert server.metric("fused_ready") == 0
    assert server.process.wait(STOP_SECONDS) == 0
    listener.join(STOP_SECONDS)
    assert listener.error is None
    assert listener.events[-1] == "[DONE]"
    assert json.loads(listener.events[-2])["choices"][0]["finish_reason"] == "length"
    wait_for(lambda: not server.survivors(), "the engine's processes have ended")
    assert "Traceback" not in server.log
    assert "ERROR" not in server.log


def test_a_second_sigterm_ends_at_once(start: Callable[..., ServerProcess]) -> None:
    # On a loaded machine the response may be complete before the second signal comes: such an attempt shows nothing.
    assert any(second_sigterm_cuts_a_stream(start) for _ in range(3))


def second_sigterm_cuts_a_stream(start: Callable[..., ServerProcess]) -> bool:
    """Whether a running response was cut; in any case the server must have ended well."""
    server = start("--shutdown-timeout", "300")
    server.wait_until_ready()
    listener = Listener(server.url, max_tokens=900)
    server.children()
    server.process.send_signal(signal.SIGTERM)
    wait_for(lambda: httpx.get(f"{server.url}/ready").status_code == 503, "no new request is taken")
    assert server.end(signal.SIGTERM) == 0
    listener.join(STOP_SECONDS)
    # A process that is being taken apart when its parent goes is a zombie a moment later.
    wait_for(lambda: not server.survivors(), "the engine's processes have ended", 10)
    return listener.events[-1] != "[DONE]" or "error" in json.loads(listener.events[-2])


def test_a_killed_server_takes_its_engine_along(start: Callable[..., ServerProcess]) -> None:
    server = start()
    server.wait_until_ready()
    assert len(server.children()) >= 2
    server.process.kill()
    server.process.wait()
    try:
        wait_for(lambda: not server.survivors(), "the engine's processes have noticed and ended", 60)
    except AssertionError as error:
        raise AssertionError(f"{server.survivors()}\n{server.log}") from error


def test_ctrl_c_while_weights_are_loaded_leaves_nothing_behind(start: Callable[..., ServerProcess]) -> None:
    server = start()
    server.wait_for_log("[3/4]")
    server.child("Worker")
    press_ctrl_c(server)
    assert server.process.wait(STOP_SECONDS) == 130
    wait_for(lambda: not server.survivors(), "the engine's processes have ended")
    assert "ready: " not in server.log
    assert "interrupted before it was ready" in server.log
    assert "Traceback" not in server.log
