"""One engine on a Ray cluster: the reference's tokens, the end of a node is the server's, the cluster is as before."""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from shutil import copyfile
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped]
import pytest

from tests.e2e.asking import ask
from tests.e2e.clients import Listener
from tests.e2e.machines import START_SECONDS
from tests.e2e.process import ServerProcess, wait_for
from tests.e2e.ray_machines import RayMachines
from tests.e2e.test_machines import LISTENING, QUESTIONS
from tests.fakes import write_tiny_fusion
from tests.reference import answer
from ultrafuser.gating.model.fusion import load_fusion

pytestmark = [pytest.mark.long, pytest.mark.timeout(2400)]

END_SECONDS = 20.0
SILENCE_SECONDS = 20.0
SHARDS = ("--tensor-parallel-size", "2")
SPLIT = ("--placement", "split")
TWO: dict[str, Any] = {
    "names": ("text", "code"),
    "num_layers": (2, 3),
    "vocab_sizes": (320, 336),
    "hidden_sizes": (64, 64),
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayMachines]:
    """Two machines, and a fusion of two specialists."""
    with RayMachines(tmp_path_factory.mktemp("ray"), 2, **TWO) as found:
        yield found


def wait_until_ready(server: ServerProcess) -> None:
    def is_ready() -> bool:
        assert server.process.poll() is None, server.log
        return "\nready: " in server.log

    wait_for(is_ready, "the server is ready", START_SECONDS)
    server.children()


def check_answers(cluster: RayMachines, server: ServerProcess) -> None:
    """Greedy answers are the reference's, token for token."""
    fusion = load_fusion(cluster.fusions[0])
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        expected, _ = answer(fusion, messages, max_new_tokens=32)
        body = {"messages": messages, "temperature": 0, "max_tokens": 32, "return_token_ids": True}
        with cluster.on_the_head():
            (choice,) = ask(server, body)["choices"]
        assert choice["token_ids"] == list(expected.token_ids)


def health(cluster: RayMachines, server: ServerProcess) -> int:
    """0: it says nothing more."""
    try:
        with cluster.on_the_head():
            return httpx.get(f"{server.url}/health", timeout=5).status_code
    except httpx.TransportError:
        return 0


def wait_until_free(cluster: RayMachines, devices: int) -> None:
    """Nothing of an engine is left in the cluster."""
    wait_for(lambda: cluster.left() == {"free": devices, "groups": [], "nodes": devices}, "all is given back", 60)


def listening_addresses(process: psutil.Process) -> set[str]:
    """Where a process on one of the machines listens; the port that Ray opens in each of its own is an IPv6 one."""
    folder = Path(f"/proc/{process.pid}")
    sockets = set()
    for file in (folder / "fd").iterdir():
        with suppress(OSError):
            sockets.add(os.readlink(file))
    lines = [line.split() for line in (folder / "net/tcp").read_text().splitlines()[1:]]
    found = [fields[1] for fields in lines if fields[3] == LISTENING and f"socket:[{fields[9]}]" in sockets]
    return {".".join(str(byte) for byte in reversed(bytes.fromhex(address.partition(":")[0]))) for address in found}


def test_shards_on_two_nodes_answer_as_the_reference_and_give_the_cluster_back(cluster: RayMachines) -> None:
    server = cluster.serve("log-shards", *SHARDS)
    wait_until_ready(server)
    check_answers(cluster, server)
    for rank in (0, 1):
        address = cluster.machines.address(rank)
        assert f"node {address}: 1 of 2 ranks" in server.log
        (process,) = cluster.processes(rank, "RayRank")
        assert process.environ()["VLLM_LOGGING_LEVEL"] == "ERROR", "the server's variables are there"
        assert listening_addresses(process) == {address}
    assert listening_addresses(server.child("EngineCore")) == {cluster.machines.address(0)}
    assert server.end() == 0
    assert not server.survivors()
    assert not cluster.processes(1, "RayRank")
    wait_until_free(cluster, 2)


def test_a_specialist_on_each_node_answers_as_the_reference(cluster: RayMachines) -> None:
    server = cluster.serve("log-split", *SPLIT)
    wait_until_ready(server)
    check_answers(cluster, server)
    assert server.end() == 0
    wait_until_free(cluster, 2)


def kill_node(cluster: RayMachines) -> None:
    cluster.kill_node(1)


def kill_rank(cluster: RayMachines) -> None:
    (rank,) = cluster.processes(1, "RayRank")
    rank.kill()


def cut_the_cable(cluster: RayMachines) -> None:
    cluster.machines.unplug(1)


def kill_engine_core(cluster: RayMachines) -> None:
    cluster._servers[-1].child("EngineCore").kill()


@pytest.mark.parametrize(
    ("fault", "placement"),
    [
        (kill_node, SHARDS),
        (kill_rank, SHARDS),
        (kill_engine_core, SHARDS),
        (cut_the_cable, SHARDS),
        (kill_node, SPLIT),
        (kill_rank, SPLIT),
    ],
    ids=lambda own: own.__name__ if callable(own) else own[0],
)
def test_what_dies_in_a_stream_ends_the_server_and_started_again_it_serves(
    cluster: RayMachines, fault: Callable[[RayMachines], None], placement: tuple[str, ...]
) -> None:
    server = cluster.serve(f"log-{fault.__name__}-{placement[0]}", *placement)
    wait_until_ready(server)
    with cluster.on_the_head():
        listener = Listener(server.url, max_tokens=900)
    fault(cluster)
    patience = SILENCE_SECONDS if fault is cut_the_cable else 10.0
    wait_for(lambda: health(cluster, server) == 503, "/health says 503", patience)
    assert listener.last_error() == "engine_dead"
    assert server.process.wait(END_SECONDS) == 1
    if fault is not kill_engine_core:
        assert f"rank 1 ({cluster.machines.address(1)}) of the Ray cluster is gone" in server.log
    wait_for(lambda: not server.survivors(), "nothing of the server is left", END_SECONDS)
    wait_for(lambda: not cluster.processes(1, "RayRank"), "nothing of the engine is left on the node", END_SECONDS)
    if fault is cut_the_cable:
        cluster.kill_node(1)
        cluster.machines.plug_in(1)
    if fault in (kill_node, cut_the_cable):
        wait_until_free(cluster, 1)
        cluster.start_node(1)
    wait_until_free(cluster, 2)
    again = cluster.serve(f"log-again-{fault.__name__}-{placement[0]}", *placement)
    wait_until_ready(again)
    check_answers(cluster, again)
    assert again.end() == 0
    wait_until_free(cluster, 2)


def test_a_node_with_another_gate_is_refused_by_name(
    cluster: RayMachines, tmp_path_factory: pytest.TempPathFactory
) -> None:
    gate = cluster.fusions[1].parent / "gate.safetensors"
    before = copyfile(gate, tmp_path_factory.mktemp("gate") / gate.name)
    other = write_tiny_fusion(tmp_path_factory.mktemp("other"), gate="closed:code", **TWO)
    copyfile(other.parent / gate.name, gate)
    try:
        server = cluster.serve("log-gate", *SHARDS)
        assert server.process.wait(START_SECONDS) == 2
        named = f"node {cluster.machines.address(1)} differs from the server's in gate: "
        assert named in server.log.splitlines()[-1]
        assert "load all specialists" not in server.log
    finally:
        copyfile(before, gate)


def test_a_cluster_without_enough_devices_is_named_with_what_it_has(cluster: RayMachines) -> None:
    server = cluster.serve("log-room", "--tensor-parallel-size", "4", "--node-timeout", "3")
    assert server.process.wait(START_SECONDS) == 2
    last = server.log.splitlines()[-1]
    assert "4 of the resource fused_rank are needed" in last
    assert f"{cluster.machines.address(1)} has 1 of 1 free" in last
