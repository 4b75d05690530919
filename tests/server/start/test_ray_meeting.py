"""What the nodes of a Ray cluster are asked before a weight is loaded, and what is said if they do not fit."""

import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import copytree
from unittest import mock

import pytest

from tests.fakes import write_tiny_fusion
from ultrafuser.gating.model.fusion import FusionConfig, inspect_fusion, load_fusion
from ultrafuser.server.engine.shared.options import EngineOptionError
from ultrafuser.server.engine.shared.ray_cluster import RayNode, connect
from ultrafuser.server.start import installed, ray_meeting
from ultrafuser.server.start.installed import installed_versions
from ultrafuser.server.start.likeness import likeness
from ultrafuser.server.start.preparing import Prepared
from ultrafuser.server.start.progress import StartupProgress
from ultrafuser.server.start.ray_meeting import _everywhere, _find_room, _refuse, describe


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same fusion on two machines, under two paths."""
    here = write_tiny_fusion(tmp_path_factory.mktemp("nodes") / "here")
    return [here, copytree(here.parent, here.parent.with_name("there")) / here.name]


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """What a node's `ray start` was told."""
    with mock.patch.dict(os.environ, {f"ULTRAFUSER_{name}": value for name, value in variables.items()}):
        yield


def here(fusion: FusionConfig) -> Prepared:
    """The server's own."""
    return Prepared(fusion, fusion, inspect_fusion(fusion), {}, None)


def test_a_node_takes_the_file_its_own_environment_names_and_is_like_the_server(
    places: list[Path], tmp_path: Path
) -> None:
    with environment(FUSION=str(places[1]), CACHE=str(tmp_path)):
        said = describe(str(places[0]), None, {})
    assert said["likeness"] == likeness(here(load_fusion(places[0])))
    paths = [*(item["model"] for item in said["spec"]["specialists"]), said["spec"]["gate"]]
    assert all(Path(path).is_relative_to(places[1].parent) for path in paths)


def test_what_is_wrong_on_a_node_is_said_and_not_raised(places: list[Path]) -> None:
    with environment(FUSION="/nowhere/fusion.yaml"):
        assert "/nowhere/fusion.yaml" in describe(str(places[0]), None, {})["refusal"]
    with environment(FUSIONS="x"):
        assert "ULTRAFUSER_FUSIONS: there is no such setting" in describe(str(places[0]), None, {})["refusal"]


def test_what_differs_is_named_by_node_and_key(places: list[Path]) -> None:
    own = likeness(here(load_fusion(places[0])))
    _refuse(own, {"a": own}, {"a": "10.0.0.2"})
    other = own | {"gate": "another"}
    message = r"^distributed_executor_backend: ray: node 10\.0\.0\.2 differs from the server's in gate: another, not "
    with pytest.raises(EngineOptionError, match=message):
        _refuse(own, {"a": own, "b": other}, {"a": "10.0.0.1", "b": "10.0.0.2"})


def test_versions_are_named_on_both_sides() -> None:
    own = installed_versions()
    assert own["version of vllm"] == "0.32.0"
    with pytest.raises(EngineOptionError, match=r"in version of ultrafuser: none, not \d"):
        _refuse(own, {"a": own | {"version of ultrafuser": "none"}}, {"a": "10.0.0.2"})


def test_the_question_for_versions_needs_nothing_of_ours_on_the_other_side() -> None:
    pytest.importorskip("ray", reason="needs Ray: pip install 'ultrafuser[ray]'")
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(installed)
    try:
        sent = cloudpickle.dumps(installed_versions)
    finally:
        cloudpickle.unregister_pickle_by_value(installed)
    program = "import sys, pickle; sys.modules['ultrafuser'] = None; print(pickle.load(sys.stdin.buffer)())"
    for message, is_answered in ((sent, True), (pickle.dumps(installed_versions), False)):
        done = subprocess.run([sys.executable, "-c", program], input=message, capture_output=True)
        assert (done.returncode == 0) is is_answered, done.stderr


def test_too_little_room_is_told_with_what_there_is() -> None:
    nodes = [RayNode("a", "10.0.0.1", 1, 1), RayNode("b", "10.0.0.2", 0, 2)]
    with (
        mock.patch.object(ray_meeting, "cluster_nodes", return_value=nodes),
        pytest.raises(EngineOptionError) as caught,
    ):
        _find_room(2, "a", 0.1, StartupProgress(5))
    for part in (
        "distributed_executor_backend: ray: 2 of the resource fused_rank are needed",
        "10.0.0.1 has 1 of 1 free, 10.0.0.2 has 0 of 2 free",
        """`ray start --resources '{"fused_rank": 1}'`""",
    ):
        assert part in str(caught.value)


def test_room_that_is_given_back_meanwhile_is_taken() -> None:
    taken, free = [RayNode("a", "10.0.0.1", 0, 1)], [RayNode("a", "10.0.0.1", 1, 1)]
    with mock.patch.object(ray_meeting, "cluster_nodes", side_effect=[taken, free]):
        assert _find_room(1, "a", 20, StartupProgress(5)) == (free, ("a",))


def test_a_path_does_not_hang_on_a_working_directory(places: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(places[0].parent)
    assert _everywhere("fusion.yaml") == str(places[0])
    assert _everywhere("demo") == "demo"


@pytest.mark.parametrize("address", ["127.0.0.1:9", "[::1]:9", "nonsense"])
def test_no_cluster_is_one_line_with_a_way_out_at_once(address: str) -> None:
    """Ray by itself tries for five minutes."""
    pytest.importorskip("ray", reason="needs Ray: pip install 'ultrafuser[ray]'")
    start = time.monotonic()
    with pytest.raises(
        EngineOptionError, match=r"no Ray cluster can be used at .*; run `ray start` on this machine first"
    ):
        connect(address, tells_workers_output=False)
    assert time.monotonic() - start < 20
