"""Nodes of one engine meet over real sockets: who is missing, there twice, or different is named on every side."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from shutil import copytree
from typing import Any, Self
from unittest import mock

import pytest

from tests.e2e.process import wait_for
from tests.fakes import write_tiny_fusion
from ultrafuser.gating.model.fusion import FusionConfig, inspect_fusion, load_fusion
from ultrafuser.gating.model.schema import EngineSettings
from ultrafuser.server.engine.shared.interfaces import interface_of, network_environment
from ultrafuser.server.engine.shared.node import Node, check_node
from ultrafuser.server.engine.shared.options import EngineOptionError, override_engine
from ultrafuser.server.engine.shared.wire import Wire
from ultrafuser.server.settings import EngineStartError, ServerSettings, SettingsError, resolve_settings
from ultrafuser.server.start import following, leading
from ultrafuser.server.start.leading import Followers, gather
from ultrafuser.server.start.likeness import likeness
from ultrafuser.server.start.listener import MeetingPoints, listen_on, meeting_points
from ultrafuser.server.start.preparing import Prepared
from ultrafuser.server.start.progress import StartupProgress

HOST = "127.0.0.1"
PATIENCE_SECONDS = 20.0


@pytest.fixture(scope="module")
def fusions(tmp_path_factory: pytest.TempPathFactory) -> list[FusionConfig]:
    """The same fusion on two machines, under two paths."""
    here = write_tiny_fusion(tmp_path_factory.mktemp("nodes") / "here")
    there = copytree(here.parent, here.parent.with_name("there"))
    return [load_fusion(here), load_fusion(there / here.name)]


@pytest.fixture
def points() -> Iterator[MeetingPoints]:
    """Two neighbouring free ports, bound."""
    for _ in range(100):
        first = listen_on(HOST, 0)
        try:
            second = listen_on(HOST, first.getsockname()[1] + 1)
        except SettingsError:
            first.close()
            continue
        with MeetingPoints(first, second) as found, mock.patch.dict("os.environ"):
            yield found
        return


def prepared(fusion: FusionConfig, points: MeetingPoints, rank: int, num_nodes: int) -> Prepared:
    """A node that has its models."""
    node = Node(rank, num_nodes, HOST, points.processes.getsockname()[1])
    return Prepared(fusion, fusion, inspect_fusion(fusion), {}, node)


class Meeting:
    """Node 0 and others, each in a thread of its own; at the end all connections are closed."""

    def __init__(self, points: MeetingPoints, fusion: FusionConfig, num_nodes: int, seconds: float) -> None:
        self._points, self._num_nodes, self._seconds = points, num_nodes, seconds
        self._pool, self._joined = ThreadPoolExecutor(), list[Future[Wire]]()
        own = prepared(fusion, points, 0, num_nodes)
        self.leader: Future[Followers] = self._pool.submit(gather, seconds, own, points, StartupProgress(5))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        futures: list[Future[Any]] = [self.leader, *self._joined]
        for future in futures:  # a node that sees another go kills processes
            if future.exception(PATIENCE_SECONDS + 5) is None:
                future.result().__exit__()
        self._pool.shutdown()

    def join(self, fusion: FusionConfig, rank: int, num_nodes: int | None = None) -> Future[Wire]:
        """Another node comes."""
        num_nodes = num_nodes or self._num_nodes
        port = self._points.processes.getsockname()[1]
        settings = ServerSettings(
            nnodes=num_nodes, node_rank=rank, master_addr=HOST, master_port=port, node_timeout=self._seconds
        )
        node = prepared(fusion, self._points, rank, num_nodes)
        self._joined.append(self._pool.submit(following._join, settings, node, StartupProgress(4)))
        return self._joined[-1]


def says(future: Future[Any], error: type[Exception] = SettingsError) -> str:
    """What a node says about why it does not start."""
    with pytest.raises(error) as caught:
        future.result(PATIENCE_SECONDS)
    return str(caught.value)


def test_nodes_that_are_alike_but_for_their_paths_meet(fusions: list[FusionConfig], points: MeetingPoints) -> None:
    with Meeting(points, fusions[0], 3, PATIENCE_SECONDS) as meeting:
        wires = [meeting.join(fusions[1], rank) for rank in (2, 1)]
        with meeting.leader.result(PATIENCE_SECONDS) as followers:
            ends = [wire.result(PATIENCE_SECONDS) for wire in wires]
            assert {end.own_address for end in ends} == {HOST}
            followers.dismiss()
            assert [end.receive(PATIENCE_SECONDS) for end in ends] == [{"end": True}] * 2


def test_torchs_meeting_point_is_open_at_the_named_address_only(
    fusions: list[FusionConfig], points: MeetingPoints
) -> None:
    with Meeting(points, fusions[0], 2, PATIENCE_SECONDS) as meeting:
        meeting.join(fusions[0], 1).result(PATIENCE_SECONDS)
        meeting.leader.result(PATIENCE_SECONDS)
        port = points.processes.getsockname()[1]
        socket.create_connection((HOST, port), timeout=5).close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port), timeout=5)


def changed(fusion: FusionConfig, **engine: Any) -> FusionConfig:
    """The fusion with other engine settings."""
    return fusion.model_copy(update={"engine": EngineSettings(**engine)})


@pytest.mark.parametrize("key", ["gate", "weights", "template", "engine"])
def test_what_differs_is_named_by_node_and_key_on_all_nodes(
    key: str, fusions: list[FusionConfig], points: MeetingPoints, tmp_path: Path
) -> None:
    other = {
        "gate": lambda: load_fusion(write_tiny_fusion(tmp_path, gate="closed:code")),
        "weights": lambda: load_fusion(write_tiny_fusion(tmp_path, seed=1)),
        "template": lambda: load_fusion(write_tiny_fusion(tmp_path, templates=("chatml", "chatml", "alpaca"))),
        "engine": lambda: changed(fusions[1], **fusions[1].engine.model_dump() | {"max_num_seqs": 7}),
    }[key]()
    named = {
        "gate": "node 2 differs from node 0 in gate: ",
        "weights": "node 2 differs from node 0 in specialists.code.model.safetensors: ",
        "template": "node 2 differs from node 0 in specialists.code.chat_template: ",
        "engine": "node 2 differs from node 0 in engine.max_num_seqs: 7, not null",
    }[key]
    with Meeting(points, fusions[0], 3, PATIENCE_SECONDS) as meeting:
        nodes: list[Future[Any]] = [meeting.join(fusions[1], 1), meeting.join(other, 2), meeting.leader]
        for node in nodes:
            assert named in says(node)
            assert "node 1 differs" not in says(node)


def test_the_version_of_a_package_counts(fusions: list[FusionConfig], points: MeetingPoints) -> None:
    with Meeting(points, fusions[0], 2, PATIENCE_SECONDS) as meeting:
        with mock.patch("ultrafuser.server.start.likeness.VLLM_VERSION", "1.0"):
            values = likeness(prepared(fusions[0], points, 1, 2))
        with mock.patch.object(following, "likeness", return_value=values):
            node = meeting.join(fusions[0], 1)
            assert "node 1 differs from node 0 in version of vllm: 1.0, not 0.32.0" in says(node)


def test_an_adapter_is_told_apart_by_its_content_and_prepared_weights_by_their_size(
    fusions: list[FusionConfig], points: MeetingPoints, tmp_path: Path
) -> None:
    adapters = [tmp_path / name for name in ("one", "two", "three")]
    for adapter, content in zip(adapters, (b"same", b"same", b"else"), strict=True):
        adapter.mkdir()
        (adapter / "adapter_model.safetensors").write_bytes(content)

    def values(adapter: Path, after: FusionConfig) -> dict[str, str]:
        specialists = [item.model_copy(update={"adapter": str(adapter)}) for item in fusions[0].specialists]
        written = fusions[0].model_copy(update={"specialists": tuple(specialists)})
        node = Node(0, 2, HOST, 1)
        return likeness(Prepared(written, after, inspect_fusion(after), {}, node))

    other_rounding = load_fusion(write_tiny_fusion(tmp_path / "rounded", seed=1))
    gate = fusions[0].gate
    assert values(adapters[0], fusions[1]) == values(adapters[1], other_rounding.model_copy(update={"gate": gate}))
    found = leading.differences(1, values(adapters[2], fusions[1]), "node 0", values(adapters[0], fusions[1]))
    assert [line.split(":")[0] for line in found] == [
        f"node 1 differs from node 0 in specialists.{name}.adapter" for name in ("code", "math", "text")
    ]


def test_a_node_that_does_not_come_is_named(fusions: list[FusionConfig], points: MeetingPoints) -> None:
    with Meeting(points, fusions[0], 3, 2) as meeting:
        node = meeting.join(fusions[1], 2)
        for side in (meeting.leader, node):
            assert "node 1 did not come within 2 s" in says(side)


def test_a_rank_is_given_once(fusions: list[FusionConfig], points: MeetingPoints) -> None:
    with Meeting(points, fusions[0], 3, PATIENCE_SECONDS) as meeting:
        first = meeting.join(fusions[1], 1)
        late = meeting.join(fusions[1], 1)
        refused = wait_for(lambda: [node for node in (first, late) if node.done()], "one of them is refused")
        assert "--node-rank: node 1 is there, from 127.0.0.1" in says(refused[0])
        meeting.join(fusions[1], 2).result(PATIENCE_SECONDS)
        meeting.leader.result(PATIENCE_SECONDS)


def test_a_node_of_more_nodes_is_refused(fusions: list[FusionConfig], points: MeetingPoints) -> None:
    with Meeting(points, fusions[0], 2, PATIENCE_SECONDS) as meeting:
        node = meeting.join(fusions[1], 2, num_nodes=3)
        for side in (meeting.leader, node):
            assert "node 2 differs from node 0 in nnodes: 3, not 2" in says(side)


@pytest.mark.parametrize(
    "noise", [b"GET / HTTP/1.1\r\n\r\n", b'{"rank": 1}\n', b'{"rank": "1", "likeness": {}}\n', b""]
)
def test_strangers_are_passed_over(noise: bytes, fusions: list[FusionConfig], points: MeetingPoints) -> None:
    with Meeting(points, fusions[0], 2, PATIENCE_SECONDS) as meeting:
        address = points.nodes.getsockname()
        points.nodes.listen()
        with socket.create_connection(address) as stranger:
            stranger.sendall(noise)
        meeting.join(fusions[1], 1).result(PATIENCE_SECONDS)
        meeting.leader.result(PATIENCE_SECONDS)


def test_without_a_node_0_the_others_say_where_they_looked(fusions: list[FusionConfig], points: MeetingPoints) -> None:
    port = points.processes.getsockname()[1]
    settings = ServerSettings(nnodes=2, node_rank=1, master_addr=HOST, master_port=port, node_timeout=1)
    with pytest.raises(SettingsError, match=f"--master-addr: no node 0 at {HOST} port {port + 1} within 1 s"):
        following._join(settings, prepared(fusions[0], points, 1, 2), StartupProgress(4))


def test_a_node_0_that_ends_meanwhile_ends_the_others(fusions: list[FusionConfig], points: MeetingPoints) -> None:
    points.nodes.listen()
    port = points.processes.getsockname()[1]
    settings = ServerSettings(nnodes=2, node_rank=1, master_addr=HOST, master_port=port, node_timeout=9)
    with ThreadPoolExecutor() as pool:
        node = pool.submit(following._join, settings, prepared(fusions[0], points, 1, 2), StartupProgress(4))
        connection, _ = points.nodes.accept()
        connection.makefile().readline()
        connection.close()
        assert "node 0 ended before all nodes had met" in says(node, EngineStartError)


def pair() -> tuple[Wire, Wire]:
    """Both ends of a connection."""
    with socket.create_server((HOST, 0)) as server:
        one = socket.create_connection(server.getsockname())
        return Wire(one), Wire(server.accept()[0])


def test_a_lost_node_ends_the_engines_processes_of_node_0() -> None:
    near, far = pair()
    killed = threading.Event()

    def kill() -> set[int]:
        killed.set()
        return set()

    with mock.patch.object(leading, "kill_children", kill), Followers({1: near}, mock.Mock()):
        assert not killed.wait(0.2)
        far.close()
        assert killed.wait(5)


def test_a_follower_that_is_asked_to_end_asks_node_0_to_end_in_order() -> None:
    near, far = pair()
    wished = threading.Event()
    with near, far, Followers({1: near}, mock.Mock()) as followers:
        far.send(leave=True)
        followers.at_wish(wished.set)
        assert wished.wait(5)


def test_a_line_too_long_and_one_cut_off_are_the_end_of_a_connection() -> None:
    for noise in (b"[" * 2**21 + b"\n", b"[1]\n", json.dumps({"end": True}).encode()):
        near, far = pair()
        thread = threading.Thread(target=lambda end=far, sent=noise: (end._connection.sendall(sent), end.close()))
        thread.start()
        assert near.receive(PATIENCE_SECONDS) is None
        near.close()
        thread.join(PATIENCE_SECONDS)


def test_a_line_that_comes_in_drops_is_waited_for_as_long_as_a_silent_one() -> None:
    """The limit was one for each of its pieces: whoever sent a byte now and then held a node for ever."""
    near, far = pair()
    is_over = threading.Event()

    def drip() -> None:
        while not is_over.wait(0.1):
            far._connection.sendall(b"[")

    thread = threading.Thread(target=drip)
    thread.start()
    try:
        start = time.monotonic()
        assert near.receive(0.5) is None
        assert 0.4 < time.monotonic() - start < 5
    finally:
        is_over.set()
        thread.join()
        near.close()
        far.close()


def test_two_objects_that_come_together_are_two() -> None:
    near, far = pair()
    with near, far:
        far._connection.sendall(b'{"a": 1}\n{"b"')
        far._connection.sendall(b": 2}\n")
        assert [near.receive(5), near.receive(5)] == [{"a": 1}, {"b": 2}]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"node_rank": "1"}, "--node-rank: 1, but ranks are 0 to 0; .*--nnodes"),
        ({"nnodes": "2", "node_rank": "2", "master_addr": HOST}, "--node-rank: 2, but ranks are 0 to 1"),
        ({"nnodes": "2", "node_rank": "1"}, "--master-addr: missing; name the address"),
        ({"master_port": "65535"}, "--master-port: .*65535"),
    ],
)
def test_flags_that_do_not_fit_are_named(flags: dict[str, str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        resolve_settings(flags, {})


@pytest.mark.parametrize(
    ("engine", "num_nodes", "message"),
    [
        ({"tensor_parallel_size": 2}, 3, "--nnodes: 2 ranks .* do not divide over 3 machines"),
        ({"placement": "split"}, 2, "--nnodes: 3 ranks .* do not divide over 2 machines"),
        ({"tensor_parallel_size": 4}, 2, "each machine gets 2 of 4 ranks, but here are 1 devices; use 4 machines"),
        ({"tensor_parallel_size": 2, "distributed_executor_backend": "uni"}, 2, "distributed_executor_backend: uni"),
        ({"tensor_parallel_size": 2, "distributed_executor_backend": "ray"}, 2, "distributed_executor_backend: ray"),
    ],
)
def test_ranks_that_do_not_fit_the_nodes_are_refused(
    engine: dict[str, Any], num_nodes: int, message: str, fusions: list[FusionConfig]
) -> None:
    with pytest.raises(EngineOptionError, match=message):
        check_node(override_engine(fusions[0], engine), Node(0, num_nodes, HOST, 1))


def test_a_taken_meeting_point_is_named_at_the_start(points: MeetingPoints) -> None:
    points.nodes.listen()
    settings = ServerSettings(nnodes=2, master_addr=HOST, master_port=points.nodes.getsockname()[1] - 1)
    points.processes.close()
    with pytest.raises(SettingsError, match=r"in use; .*choose another --master-port"):
        meeting_points(settings)
    with pytest.raises(SettingsError, match=r"cannot listen on 192\.0\.2\.1 .*correct the address"):
        meeting_points(settings.model_copy(update={"master_addr": "192.0.2.1"}))


def test_the_engine_is_kept_to_the_interface_of_the_nodes_address() -> None:
    assert interface_of(HOST) == "lo"
    assert interface_of("192.0.2.1") is None
    wanted = {"VLLM_HOST_IP": HOST, "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    assert network_environment({}, HOST) == wanted
    assert network_environment({"VLLM_HOST_IP": "x", "NCCL_SOCKET_IFNAME": "y"}, HOST) == {"GLOO_SOCKET_IFNAME": "lo"}
