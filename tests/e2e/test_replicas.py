"""Two real servers behind the shipped balancer: conversations stay and are found in the cache, nobody loses an answer
when a replica ends, and no client hangs when one is killed."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

from tests.balancer import FOLDER, Balancer, free_port
from tests.e2e.process import STOP_SECONDS, ServerProcess, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

NUM_CONVERSATIONS = 16
NUM_TURNS = 4
NUM_AT_ONCE = 4
PER_MINUTE = 6
DELAY_SECONDS = 5
PATIENCE_SECONDS = 200.0
"""Of a client on a machine that does much else; one that waits for longer hangs."""

BODY_BYTES = 8 * 2**20
KEYS = [f"key-of-client-{number}" for number in range(200)]


class Fleet:
    """Two servers and the balancer; each client has a key of its own."""

    def __init__(self, fusion: Path, folder: Path) -> None:
        self._fusion, self._folder = fusion, folder
        (folder / "keys").write_text("\n".join(KEYS))
        self.port = free_port("0.0.0.0")
        self._starts = count()
        self._keys = iter(KEYS)
        self.servers = {f"replica-{number}": self._start(number) for number in (1, 2)}
        self.balancer = Balancer(folder / "balancer", self.port)

    def _start(self, number: int) -> ServerProcess:
        options = ["--host", f"127.0.0.{number}", "--port", str(self.port)]
        options += ["--api-key-file", str(self._folder / "keys"), "--requests-per-minute", str(PER_MINUTE)]
        options += ["--shutdown-delay", str(DELAY_SECONDS), "--shutdown-timeout", "60"]
        return ServerProcess(self._fusion, self._folder / f"log-{next(self._starts)}", *options)

    def restart(self, name: str) -> None:
        """Begin to start a replica that has ended."""
        self.servers[name].kill()
        self.servers[name] = self._start(int(name[-1]))

    def wait_until_ready(self) -> None:
        """All replicas get requests."""
        for server in self.servers.values():
            server.wait_until_ready()
        wait_for(lambda: self.balancer.ready() == set(self.servers), "the balancer has found both", 20)

    def end(self) -> None:
        """End all of it."""
        self.balancer.__exit__()
        for server in self.servers.values():
            server.kill()

    def headers(self) -> dict[str, str]:
        """Those of one more client."""
        return {"Authorization": f"Bearer {next(self._keys)}"}

    def total(self, metric: str) -> float:
        """The sum of a counter over the replicas."""
        return sum(server.metric(metric) for server in self.servers.values())


@pytest.fixture(scope="module")
def fleet(tiny_fusion: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Shared by the tests of this module, which leave it whole."""
    fleet = Fleet(tiny_fusion, tmp_path_factory.mktemp("replicas"))
    try:
        fleet.wait_until_ready()
        yield fleet
    finally:
        fleet.end()


def chat(content: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 8, **fields}


class Conversation:
    """A client that talks for some turns, each of which sends all that was said before."""

    def __init__(self, url: str, number: int, headers: dict[str, str]) -> None:
        self._client = httpx.Client(base_url=url, headers=headers, timeout=60)
        opening = f"Number {number} asks for an ode of {number + 2} lines to the sea, to be read at a fair."
        self._messages = [{"role": "user", "content": opening}]
        self.replicas: list[str] = []

    def turn(self) -> None:
        """Ask, and say something to the answer."""
        body = {"messages": self._messages, "max_tokens": 8, "temperature": 0}
        response = self._client.post("/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        self.replicas.append(response.headers["x-replica"])
        self._messages.append(response.json()["choices"][0]["message"])
        self._messages.append(
            {"role": "user", "content": "And once again, with another beginning, but as long as that."}
        )

    def talk(self) -> list[str]:
        """All turns; the replicas that answered."""
        with self._client:
            for _ in range(NUM_TURNS):
                self.turn()
        return self.replicas


def talk(fleet: Fleet, balancer: Balancer, first: int) -> tuple[float, float]:
    """Share of turns on the replica of their conversation's first one, and the prefix cache's hit rate."""
    names = ("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total")
    before = [fleet.total(name) for name in names]
    numbers = range(first, first + NUM_CONVERSATIONS)
    conversations = [Conversation(balancer.url, number, fleet.headers()) for number in numbers]
    with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        answered = list(pool.map(Conversation.talk, conversations))
    hits, queries = (fleet.total(name) - value for name, value in zip(names, before, strict=True))
    at_home = sum(replica == each[0] for each in answered for replica in each)
    assert len({each[0] for each in answered}) == 2
    return at_home / (NUM_CONVERSATIONS * NUM_TURNS), hits / queries


def test_conversations_stay_on_their_replica_and_are_found_in_its_cache(fleet: Fleet, tmp_path: Path) -> None:
    stayed, hit_rate = talk(fleet, fleet.balancer, 0)
    shipped = (FOLDER / "haproxy.cfg").read_text()
    sticky = "balance hash var(txn.key)"
    assert sticky in shipped
    config = tmp_path / "haproxy.cfg"
    config.write_text(shipped.replace(sticky, "balance random"))
    with Balancer(tmp_path / "log", fleet.port, config) as scattering:
        wait_for(lambda: len(scattering.ready()) == 2, "both are ready")
        scattered, scattered_hit_rate = talk(fleet, scattering, 100)
    print(f"on their replica: {stayed:.2f}, at random {scattered:.2f}; hits: {hit_rate:.3f}, {scattered_hit_rate:.3f}")
    assert stayed == 1.0 > scattered
    assert hit_rate > 1.1 * scattered_hit_rate


def test_official_clients_are_answered(fleet: Fleet) -> None:
    with openai.OpenAI(base_url=f"{fleet.balancer.url}/v1", api_key=next(fleet._keys), max_retries=0) as client:
        messages: Any = [{"role": "user", "content": "Hi"}]
        *_, last = client.chat.completions.create(model="tiny", messages=messages, max_tokens=4, stream=True)
        assert last.choices[0].finish_reason in ("length", "stop")
        assert client.responses.create(model="tiny", input="Hi", max_output_tokens=4).status == "incomplete"
    with anthropic.Anthropic(base_url=fleet.balancer.url, api_key=next(fleet._keys), max_retries=0) as claude:
        message = claude.messages.create(model="tiny", max_tokens=4, messages=[{"role": "user", "content": "Hi"}])
        assert message.usage.output_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_request_within_two_seconds(fleet: Fleet, stream: bool) -> None:
    left = fleet.total("fused_client_disconnects_total")
    body = chat("Go on.", ignore_eos=True, stream=stream) | {"max_tokens": 900}
    with httpx.Client(base_url=fleet.balancer.url, headers=fleet.headers()) as client:
        if stream:
            with client.stream("POST", "/v1/chat/completions", json=body) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/chat/completions", json=body, timeout=1)
    start = time.monotonic()
    wait_for(lambda: fleet.total("fused_client_disconnects_total") > left, "a replica has noticed", 10)
    wait_for(lambda: fleet.total("fused_unfinished_requests") == 0, "the engine is idle", 10)
    assert time.monotonic() - start < 2


def test_a_key_may_use_its_share_on_each_replica(fleet: Fleet) -> None:
    """The number that is documented times the number of replicas, then 429, whatever conversation it is."""
    headers = fleet.headers()
    with httpx.Client(base_url=fleet.balancer.url, headers=headers, timeout=60) as client:
        body = chat("Hi")
        answers = [client.post("/v1/chat/completions", json=body) for _ in range(2 * PER_MINUTE + 3)]
    assert [each.status_code for each in answers] == [200] * 2 * PER_MINUTE + [429] * 3
    assert answers[-1].json()["error"]["code"] == "rate_limit_exceeded"
    assert int(answers[-1].headers["retry-after"]) > 1


@pytest.mark.parametrize("is_late", [False, True])
def test_a_body_of_eight_mebibytes_passes_and_a_longer_one_is_refused(fleet: Fleet, is_late: bool) -> None:
    with httpx.Client(base_url=fleet.balancer.url, headers=fleet.headers(), timeout=60) as client:
        for extra, status in [(0, 200), (1, 413)]:
            body = chat("Hi") | {"padding": ""}
            ordered = dict(reversed(body.items())) if is_late else body
            ordered["padding"] = "x" * (BODY_BYTES + extra - len(json.dumps(body)))
            content = json.dumps(ordered).encode()
            assert len(content) == BODY_BYTES + extra
            response = client.post(
                "/v1/chat/completions", content=content, headers={"Content-Type": "application/json"}
            )
            assert response.status_code == status, response.text
            assert status == 200 or response.json()["error"]["code"] == "request_too_large"


class Clients:
    """Some that talk without a pause, streamed and not, until they are told to end."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._is_over = False
        self.answers: list[str] = []
        """How requests ended, but for those that were answered well."""

        self.num_answered = 0
        self._pool = ThreadPoolExecutor(NUM_AT_ONCE)
        self._clients = [self._pool.submit(self._talk, number) for number in range(NUM_AT_ONCE)]

    def _talk(self, number: int) -> None:
        while not self._is_over:
            fleet = self._fleet
            options: Any = {"headers": fleet.headers(), "timeout": PATIENCE_SECONDS}
            with httpx.Client(base_url=fleet.balancer.url, **options) as client:
                for request in range(PER_MINUTE):
                    if self._is_over:
                        return
                    body = chat(f"Client {number} wants {request}.", ignore_eos=True) | {"max_tokens": 50}
                    end = self._stream(client, body) if number % 2 else self._ask(client, body)
                    if end:
                        self.answers.append(end)
                    else:
                        self.num_answered += 1

    def _ask(self, client: httpx.Client, body: dict[str, Any]) -> str:
        response = client.post("/v1/chat/completions", json=body)
        return "" if response.status_code == 200 else f"{response.status_code} {response.json()['error']['code']}"

    def _stream(self, client: httpx.Client, body: dict[str, Any]) -> str:
        try:
            with client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as response:
                lines = [line for line in response.iter_lines() if line]
        except httpx.RemoteProtocolError:
            return "broken off"
        if response.status_code != 200:
            return f"{response.status_code} {lines}"
        return "" if lines[-1] == "data: [DONE]" and '"error"' not in lines[-2] else lines[-2]

    def wait_for_answers(self, num: int) -> None:
        """Until so many more were given."""
        aim = self.num_answered + num
        wait_for(lambda: self.num_answered >= aim or self._failure(), "answers", PATIENCE_SECONDS)

    def _failure(self) -> bool:
        return any(client.done() for client in self._clients)

    def end(self) -> None:
        """Each ends with its last request.

        Raises:
            Exception: what went wrong in a client and is no answer.
        """
        self._is_over = True
        for client in self._clients:
            client.result(2 * PATIENCE_SECONDS)
        self._pool.shutdown()


def test_a_replica_that_ends_costs_nobody_an_answer(fleet: Fleet) -> None:
    clients = Clients(fleet)
    clients.wait_for_answers(NUM_AT_ONCE)
    assert fleet.servers["replica-2"].end() == 0
    clients.wait_for_answers(NUM_AT_ONCE)
    clients.end()
    fleet.restart("replica-2")
    assert clients.answers == []


def test_a_replica_that_is_killed_is_one_clear_error_for_those_it_answered(fleet: Fleet) -> None:
    fleet.wait_until_ready()
    clients = Clients(fleet)
    clients.wait_for_answers(2 * NUM_AT_ONCE)
    fleet.servers["replica-1"].process.kill()
    fleet.servers["replica-1"].process.wait(STOP_SECONDS)
    clients.wait_for_answers(2 * NUM_AT_ONCE)
    clients.end()
    assert set(clients.answers) <= {"broken off", "502 replica_lost"}
    assert len(clients.answers) <= NUM_AT_ONCE  # of each client at most the request that was running
