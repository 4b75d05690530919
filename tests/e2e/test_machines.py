"""One engine over several machines: the reference's tokens, the end of one is that of all, nothing is left behind."""

import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from shutil import copytree
from typing import Any, Self

import httpx
import psutil  # type: ignore[import-untyped]
import pytest

from tests.e2e.asking import ask
from tests.e2e.clients import Listener
from tests.e2e.machines import START_SECONDS, Machines
from tests.e2e.process import ServerProcess, wait_for
from tests.fakes import write_tiny_fusion
from tests.reference import answer
from ultrafuser.gating.model.fusion import load_fusion

pytestmark = [pytest.mark.long, pytest.mark.timeout(2400)]

QUESTIONS = ("Hi", "What is the sum of two and three?", "Write a function that sorts a list, and say how it works.")
END_SECONDS = 20.0
"""For all processes of all nodes, once one of them is lost, or their requests have ended."""

LISTENING = "0A"
SHARDS = ("--tensor-parallel-size", "2")
PATIENCE = ("--shutdown-timeout", "60")


class Cluster:
    """One engine over machines, each of which has a copy of the fusion under a path of its own, and its own cache."""

    def __init__(self, folder: Path, count: int, *options: str, **fusion: Any) -> None:
        self.machines = Machines(count)
        first = write_tiny_fusion(folder / "machine-0", **fusion)
        copies = [copytree(first.parent, folder / f"machine-{rank}") / first.name for rank in range(1, count)]
        self.fusions = [first, *copies]
        self.nodes: list[ServerProcess] = []
        self._folder, self._options = folder, options

    def __enter__(self) -> Self:
        self.machines.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        for node in self.nodes:
            node.kill()
        self.machines.__exit__()

    def start(self) -> None:
        """Start all nodes; they may come in any order."""
        self.nodes = []
        for rank, fusion in reversed(list(enumerate(self.fusions))):
            log, cache = self._folder / f"log-{rank}", self._folder / f"cache-{rank}"
            self.nodes.insert(0, self.machines.start(rank, fusion, log, "--cache", str(cache), *self._options))

    def wait_until_ready(self) -> None:
        """Wait until the first one serves."""

        def is_ready() -> bool:
            for node in self.nodes:
                assert node.process.poll() is None, node.log
            return "\nready: " in self.nodes[0].log

        wait_for(is_ready, "node 0 serves", START_SECONDS)
        for node in self.nodes:
            node.children()

    def check_answers(self) -> None:
        """Greedy answers are the reference's, token for token."""
        fusion = load_fusion(self.fusions[0])
        for question in QUESTIONS:
            messages = [{"role": "user", "content": question}]
            expected, _ = answer(fusion, messages, max_new_tokens=32)
            body = {"messages": messages, "temperature": 0, "max_tokens": 32, "return_token_ids": True}
            with self.machines.on(0):
                (choice,) = ask(self.nodes[0], body)["choices"]
            assert choice["token_ids"] == list(expected.token_ids)

    def stream(self, max_tokens: int = 900) -> Listener:
        """A client in the middle of its answer."""
        with self.machines.on(0):
            return Listener(self.nodes[0].url, max_tokens=max_tokens)

    def health(self) -> int:
        """What node 0 says of itself; 0: nothing more."""
        try:
            with self.machines.on(0):
                return httpx.get(f"{self.nodes[0].url}/health", timeout=5).status_code
        except httpx.TransportError:
            return 0

    def statuses(self, seconds: float = END_SECONDS) -> list[int]:
        """With which all nodes have ended within so long, when nothing that they started is left."""
        deadline = time.monotonic() + seconds
        statuses = [node.process.wait(max(0, deadline - time.monotonic())) for node in self.nodes]
        left = max(0.1, deadline - time.monotonic())
        wait_for(lambda: not [each for node in self.nodes for each in node.survivors()], "nothing is left", left)
        return statuses


def listening_addresses(process: psutil.Process) -> set[str]:
    """Where a machine, that of a process, is listened at, but for the port of its HTTP server."""
    lines = Path(f"/proc/{process.pid}/net/tcp").read_text().splitlines()[1:]
    found = [line.split()[1] for line in lines if line.split()[3] == LISTENING]
    return {".".join(str(byte) for byte in reversed(bytes.fromhex(address.partition(":")[0]))) for address in found}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two machines with a shard of every specialist each."""
    with Cluster(tmp_path_factory.mktemp("shared"), 2, *SHARDS, *PATIENCE) as cluster:
        cluster.start()
        cluster.wait_until_ready()
        yield cluster


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three machines with a specialist each."""
    with Cluster(tmp_path_factory.mktemp("split"), 3, "--placement", "split") as cluster:
        cluster.start()
        cluster.wait_until_ready()
        yield cluster


def test_shards_on_two_machines_answer_as_the_reference(shared: Cluster) -> None:
    shared.check_answers()


def test_the_engine_is_heard_at_the_named_interface_only(shared: Cluster) -> None:
    for rank, node in enumerate(shared.nodes):
        own = {"127.0.0.1"} if rank == 0 else set()  # where its HTTP server is
        assert listening_addresses(psutil.Process(node.process.pid)) - own == {shared.machines.address(rank)}


def test_a_machine_that_dies_in_a_stream_ends_all_and_started_again_they_serve(shared: Cluster) -> None:
    listener = shared.stream()
    shared.nodes[1].process.send_signal(signal.SIGKILL)
    wait_for(lambda: shared.health() == 503, "/health says 503")
    assert listener.last_error() == "engine_dead"
    assert shared.statuses() == [1, -signal.SIGKILL]
    assert f"node 1 ({shared.machines.address(1)}) is gone" in shared.nodes[0].log
    serves_again(shared)
    ends_in_order_when_any_node_is_asked_to(shared)


def serves_again(cluster: Cluster) -> None:
    """All nodes are started again."""
    cluster.start()
    cluster.wait_until_ready()
    cluster.check_answers()


def ends_in_order_when_any_node_is_asked_to(cluster: Cluster) -> None:
    """As where an orchestrator tells all machines to end at once: running requests finish."""
    listener = cluster.stream(max_tokens=60)
    cluster.nodes[1].process.send_signal(signal.SIGTERM)
    assert cluster.statuses(60 + END_SECONDS) == [0, 0]
    listener.join(END_SECONDS)
    assert listener.error is None
    assert listener.events[-1] == "[DONE]"
    assert "error" not in listener.events[-2]


def test_a_specialist_on_each_of_three_machines_answers_as_the_reference(split: Cluster) -> None:
    split.check_answers()


def test_a_machine_that_is_cut_off_in_a_stream_ends_all_and_started_again_they_serve(split: Cluster) -> None:
    listener = split.stream()
    split.machines.unplug(2)
    wait_for(lambda: split.health() == 503, "/health says 503", 60)
    assert listener.last_error() == "engine_dead"
    assert split.statuses() == [1, 1, 1]
    split.machines.plug_in(2)
    serves_again(split)


@pytest.mark.parametrize("victim", ["node 0", "worker of node 1"])
def test_without_node_0_or_a_worker_all_end_and_started_again_they_serve(victim: str, tmp_path: Path) -> None:
    two: dict[str, Sequence[Any]] = {"names": ("text", "code"), "num_layers": (2, 3), "vocab_sizes": (320, 336)}
    with Cluster(tmp_path, 2, "--placement", "split", hidden_sizes=(64, 64), **two) as cluster:
        cluster.start()
        cluster.wait_until_ready()
        listener = cluster.stream()
        if victim == "node 0":
            cluster.nodes[0].process.kill()
        else:
            cluster.nodes[1].child("Worker").kill()
        assert cluster.statuses() == ([-signal.SIGKILL, 1] if victim == "node 0" else [1, 1])
        listener.join(END_SECONDS)
        serves_again(cluster)


def test_a_machine_with_another_gate_is_refused_by_name_on_all(tmp_path: Path) -> None:
    with Cluster(tmp_path, 2, *SHARDS) as cluster:
        write_tiny_fusion(cluster.fusions[1].parent, gate="closed:math")
        cluster.start()
        assert cluster.statuses(START_SECONDS) == [2, 2]
        for node in cluster.nodes:
            assert "node 1 differs from node 0 in gate: " in node.log.splitlines()[-1]
            assert "load all specialists" not in node.log
