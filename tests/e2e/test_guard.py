"""Keys, shares, names, a full server, clients that leave and the deadline of the shutdown: one guarded server."""

import json
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.clients import Listener
from tests.e2e.process import STOP_SECONDS, ServerProcess, wait_for
from ultrafuser.server.access.admission import MIN_ARRIVAL_SECONDS

pytestmark = pytest.mark.slow

NUM_KEYS = 60
PER_MINUTE = 30
MAX_UNFINISHED = 4
MAX_RUNNING = 2
RUNNING, WAITING = "vllm:num_requests_running{", "vllm:num_requests_waiting{"
LEAVE_SECONDS = 2.0


class GuardedServer(ServerProcess):
    """A server with keys, each of which is handed out once."""

    def __init__(self, fusion: Path, folder: Path) -> None:
        keys = [f"sk-guard-{number:02}-a8f5" for number in range(NUM_KEYS)]
        (folder / "keys").write_text("# for these tests\n" + "\n".join(keys))
        options: dict[str, Any] = {
            "api-key-file": folder / "keys",
            "requests-per-minute": PER_MINUTE,
            "concurrent-requests": 2,
            "allowed-host": "127.0.0.1",
            "max-num-queued-reqs": MAX_UNFINISHED,
            "max-num-seqs": MAX_RUNNING,
            "shutdown-timeout": 1,
        }
        flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        super().__init__(fusion, folder / "log", *flags, "--cache-salt-per-key")
        self.keys = keys
        self._unused = iter(keys)

    def key(self) -> dict[str, str]:
        """Headers with a key that no other test uses."""
        return {"Authorization": f"Bearer {next(self._unused)}"}

    def ask(self, headers: dict[str, str], **fields: Any) -> httpx.Response:
        """A request for a few tokens, the same ones at every time."""
        body = {"messages": [{"role": "user", "content": "Go on."}], "max_tokens": 4, "temperature": 0, **fields}
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, headers=headers, timeout=60)

    def num_turned_away(self) -> float:
        """Requests refused because the server was full, those whose bodies a loaded machine brought late among them."""
        return sum(
            self.metric(f'fused_rejections_total{{reason="{reason}"}}') for reason in ("queue_full", "slow_body")
        )

    def is_idle(self) -> bool:
        """Whether no request runs or waits."""
        return self.metric(RUNNING) == self.metric(WAITING) == 0


@pytest.fixture(scope="module")
def guarded(tiny_fusion: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuardedServer]:
    server = GuardedServer(tiny_fusion, tmp_path_factory.mktemp("guarded"))
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.kill()


def code(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


@pytest.mark.parametrize(
    "header", [None, b"", b"Bearer", b"Bearer wrong", b"Basic sk-guard-00-a8f5", b"Bearer \xe9\xff", b"Bearer sk-guard"]
)
def test_without_a_right_key_only_probes_answer(guarded: GuardedServer, header: bytes | None) -> None:
    headers = [] if header is None else [(b"Authorization", header)]
    for path in ("/v1/models", "/version", "/openapi.json", "/nothing", "//health", "/%68ealth/../v1/models"):
        response = httpx.get(guarded.url + path, headers=headers)
        assert code(response) == (401, "invalid_api_key"), path
        assert response.headers["www-authenticate"] == "Bearer"
    assert httpx.get(f"{guarded.url}/ready", headers=headers).status_code == 200


def test_the_official_client_is_told_of_a_wrong_key_on_every_route(guarded: GuardedServer) -> None:
    with openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            client.responses.create(model="tiny", input="Hi")
        with pytest.raises(openai.AuthenticationError):
            client.responses.create(model="tiny", input="Hi", stream=True)


def test_a_host_header_opens_nothing(guarded: GuardedServer) -> None:
    for host in ("x/health?", "a/#", "evil.example", "127.0.0.1/health?"):
        answer = raw_request(guarded, f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\n")
        assert re.match(rb"HTTP/1.1 40[01] ", answer), host
    answer = raw_request(guarded, f"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: {guarded.key()}\r\n")
    assert b'"untrusted_host"' in answer


def raw_request(server: ServerProcess, head: str) -> bytes:
    url = httpx.URL(server.url)
    with socket.create_connection((url.host, url.port), timeout=10) as connection:
        connection.sendall(f"{head}Connection: close\r\n\r\n".encode())
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_a_used_up_key_waits_and_others_do_not(guarded: GuardedServer) -> None:
    before = guarded.metric('fused_rejections_total{reason="rate_limit"}')
    used_up, other = guarded.key(), guarded.key()
    with httpx.Client(base_url=guarded.url, headers=used_up) as client:
        statuses = [client.get("/v1/models").status_code for _ in range(PER_MINUTE)]
        refused = client.get("/v1/models")
    assert set(statuses) == {200}
    assert code(refused) == (429, "rate_limit_exceeded")
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert guarded.ask(other).status_code == 200
    assert guarded.metric('fused_rejections_total{reason="rate_limit"}') == before + 1


def test_a_key_has_so_many_requests_at_once(guarded: GuardedServer) -> None:
    key = guarded.key()
    with ThreadPoolExecutor(5) as pool:
        responses = list(pool.map(lambda _: guarded.ask(key, max_tokens=200, ignore_eos=True), range(5)))
    assert sorted({response.status_code for response in responses}) == [200, 429]
    assert sum(response.status_code == 200 for response in responses) >= 2
    assert guarded.ask(key).status_code == 200


def test_no_key_finds_what_another_has_left_in_the_cache(guarded: GuardedServer) -> None:
    text = [{"role": "user", "content": "The quick brown fox jumps over the lazy dog. " * 4}]

    def num_cached(key: dict[str, str], **fields: Any) -> int:
        response = guarded.ask(key, messages=text, **fields).json()
        return (response["usage"]["prompt_tokens_details"] or {}).get("cached_tokens") or 0

    alice, bob = guarded.key(), guarded.key()
    assert num_cached(alice) == 0
    assert (shared := num_cached(alice)) >= 32
    assert num_cached(bob) == 0
    assert num_cached(bob) == shared
    assert num_cached(bob, cache_salt="own") == 0
    completion = {"prompt": text[0]["content"], "max_tokens": 1}
    answers = [
        httpx.post(f"{guarded.url}/v1/completions", json=completion, headers=key).json()["usage"]
        for key in (alice, alice, bob)
    ]
    assert [bool((usage["prompt_tokens_details"] or {}).get("cached_tokens")) for usage in answers] == [
        False, True, False,
    ]  # fmt: skip


def test_a_full_server_refuses_at_once_and_finishes_what_it_took(guarded: GuardedServer) -> None:
    before = guarded.num_turned_away()
    keys = [guarded.key() for _ in range(25)]
    with ThreadPoolExecutor(50) as pool:
        responses = list(pool.map(lambda key: guarded.ask(key, max_tokens=100, ignore_eos=True), keys * 2))
    accepted = [response for response in responses if response.status_code == 200]
    refused = [response for response in responses if response.status_code != 200]
    assert {response.json()["usage"]["completion_tokens"] for response in accepted} == {100}
    assert len(accepted) >= MAX_UNFINISHED
    assert len(refused) > 10
    assert {code(response) for response in refused} == {(503, "server_overloaded")}
    assert {response.headers["retry-after"] for response in refused} == {"1"}
    assert guarded.num_turned_away() == before + len(refused)
    milliseconds = sorted(int(number) for number in re.findall(r"completions' 503 (\d+) ms", guarded.log))
    assert milliseconds[len(milliseconds) // 2] < 500
    wait_for(guarded.is_idle, "nothing runs or waits")


def test_requests_whose_bodies_do_not_come_keep_nobody_out(guarded: GuardedServer) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "Go on."}], "max_tokens": 4}).encode()
    before = guarded.metric('fused_rejections_total{reason="slow_body"}')
    with ExitStack() as stack:
        slow = [stack.enter_context(begin_request(guarded, len(body))) for _ in range(MAX_UNFINISHED)]
        key = guarded.key()
        wait_for(lambda: guarded.ask(key).status_code == 503, "the slow ones fill the server")
        time.sleep(MIN_ARRIVAL_SECONDS + 0.5)
        assert guarded.ask(key).status_code == 200
        assert guarded.metric('fused_rejections_total{reason="slow_body"}') == before + 1
        refused = slow[0].recv(65536)
        assert refused.startswith(b"HTTP/1.1 503 ")
        assert b"server_overloaded" in refused
        slow[1].sendall(body)
        assert slow[1].recv(65536).startswith(b"HTTP/1.1 200 ")


def begin_request(guarded: GuardedServer, length: int) -> socket.socket:
    """A connection that has sent all of a request but its body."""
    ((name, value),) = guarded.key().items()
    address = httpx.URL(guarded.url)
    connection = socket.create_connection((address.host, address.port or 80), timeout=20)
    connection.sendall(
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {address.host}\r\n{name}: {value}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n".encode()
    )
    return connection


def test_several_choices_count_as_several_requests(guarded: GuardedServer) -> None:
    assert code(guarded.ask(guarded.key(), n=MAX_UNFINISHED + 1, temperature=1)) == (503, "server_overloaded")
    assert guarded.ask(guarded.key(), n=MAX_UNFINISHED, temperature=1).status_code == 200


LEAVING: dict[str, dict[str, Any]] = {
    "in a stream": {"stream": True},
    "before the first token": {"stream": True, "reads": 0},
    "without a stream": {"reads": 0},
    "a stream of several choices": {"stream": True, "n": 2},
    "several choices": {"n": 2, "reads": 0},
}


@pytest.mark.parametrize("case", LEAVING)
def test_a_client_that_leaves_ends_its_request(guarded: GuardedServer, case: str) -> None:
    left = guarded.metric("fused_client_disconnects_total")
    headers = guarded.key()
    # On a loaded machine a client may be noticed only when everything is generated: that shows nothing.
    assert any(leave(guarded, headers, **LEAVING[case]) for _ in range(4))
    assert guarded.metric("fused_client_disconnects_total") > left


def leave(server: GuardedServer, headers: dict[str, str], reads: int = 3, **fields: Any) -> bool:
    """Ask for a long response, read so many lines of it, leave; whether it was ended early and in time."""
    generated = server.metric("vllm:generation_tokens_total{")
    body = {"messages": [{"role": "user", "content": "Go on."}], "max_tokens": 900, "ignore_eos": True, **fields}
    connection = open_request(server, headers, body)
    with connection, connection.makefile("rb") as lines:
        if reads:
            for _ in range(12 + reads):  # a dozen lines of headers
                lines.readline()
        else:
            wait_for(lambda: server.metric(RUNNING) > 0, "it runs")
    start = time.monotonic()
    wait_for(server.is_idle, "nothing runs or waits")
    is_in_time = time.monotonic() - start < LEAVE_SECONDS
    return is_in_time and server.metric("vllm:generation_tokens_total{") - generated < 900


def open_request(server: ServerProcess, headers: dict[str, str], body: dict[str, Any]) -> socket.socket:
    url = httpx.URL(server.url)
    content = json.dumps(body).encode()
    lines = ["POST /v1/chat/completions HTTP/1.1", f"Host: {url.host}", "Content-Type: application/json"]
    lines += [f"Content-Length: {len(content)}", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    connection = socket.create_connection((url.host, url.port), timeout=30)
    connection.sendall("\r\n".join(lines).encode() + content)
    return connection


def test_a_client_that_leaves_the_queue_touches_nobody(guarded: GuardedServer) -> None:
    fields: dict[str, Any] = {"max_tokens": 300, "temperature": 0, "headers": guarded.key()}
    alone = Listener(guarded.url, **fields)
    alone.join()
    running = [Listener(guarded.url, **fields) for _ in range(MAX_RUNNING)]
    body = {"messages": [{"role": "user", "content": "Wait."}], "max_tokens": 8}
    with open_request(guarded, guarded.key(), body):
        wait_for(lambda: guarded.metric(WAITING) == 1, "the third waits")
    wait_for(lambda: guarded.metric(WAITING) == 0, "it has left the queue", LEAVE_SECONDS)
    assert guarded.metric(RUNNING) == MAX_RUNNING
    for listener in running:
        listener.join()
        assert listener.text() == alone.text()


def test_no_key_is_in_the_log(guarded: GuardedServer) -> None:
    assert "api_key_file" in guarded.log
    assert [key for key in guarded.keys if key in guarded.log] == []


def test_metrics_answer_twenty_at_once_under_load(guarded: GuardedServer) -> None:
    listener = Listener(guarded.url, max_tokens=100, headers=guarded.key())
    with ThreadPoolExecutor(20) as pool:
        scrapes = list(pool.map(lambda _: httpx.get(f"{guarded.url}/metrics"), range(20)))
    assert {scrape.status_code for scrape in scrapes} == {200}
    listener.join()
    assert listener.events[-1] == "[DONE]"


def test_at_the_deadline_of_the_shutdown_clients_are_told(guarded: GuardedServer) -> None:
    """The last test of this server: it ends."""
    wait_for(guarded.is_idle, "nothing runs or waits")
    answers: list[httpx.Response] = []
    whole = threading.Thread(target=lambda: answers.append(guarded.ask(guarded.key(), max_tokens=900, ignore_eos=True)))
    listener = Listener(guarded.url, max_tokens=900, headers=guarded.key())
    whole.start()
    wait_for(lambda: guarded.metric(RUNNING) + guarded.metric(WAITING) >= 2, "both were taken")
    start = time.monotonic()
    assert guarded.end(signal.SIGTERM) == 0
    assert time.monotonic() - start < STOP_SECONDS / 2
    whole.join(30)
    assert listener.last_error() == "shutting_down"
    assert code(answers[0]) == (503, "shutting_down")
    wait_for(lambda: not guarded.survivors(), "the engine's processes have ended", 10)
