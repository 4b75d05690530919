"""A server whose specialists have processes of their own, one of which fails: clients are told, and all of it ends."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil  # type: ignore[import-untyped]
import pytest

from tests.e2e.process import ServerProcess
from tests.e2e.test_faults import RAISE_ON_DEMAND, ask, check_the_end
from tests.fakes import write_tiny_fusion

pytestmark = pytest.mark.long

STALL_SECONDS = 2.0
EXIT_SECONDS = 20.0


@pytest.fixture(scope="module")
def fusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two specialists that draft, the second of which has twelve layers."""
    folder = tmp_path_factory.mktemp("split")
    return write_tiny_fusion(
        folder,
        num_layers=(1, 12),
        hidden_sizes=(64, 64),
        vocab_sizes=(320, 328),
        names=("text", "code"),
        engine={"placement": "split", "speculation": {"drafter": "leading", "min_tokens": 1, "max_tokens": 2}},
    )


def worker_of(server: ServerProcess, rank: int) -> psutil.Process:
    """A rank's process: they are started in order."""
    workers = [child for child in server.children() if "Worker" in child.name()]
    return sorted(workers, key=lambda own: own.create_time())[rank]


def touch(server: ServerProcess, file: Path) -> None:
    file.touch()


def kill(server: ServerProcess, file: Path) -> None:
    worker_of(server, 1).kill()


def suspend(server: ServerProcess, file: Path) -> None:
    worker_of(server, 1).suspend()


@pytest.mark.parametrize("fault", [touch, kill, suspend])
def test_a_followers_end_is_the_servers(
    fusion: Path, tmp_path: Path, fault: Callable[[ServerProcess, Path], None]
) -> None:
    (tmp_path / "sitecustomize.py").write_text(RAISE_ON_DEMAND)
    environ = {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]),
        "FAULT_FILE": str(tmp_path / "fault"),
    }
    server = ServerProcess(
        fusion, tmp_path / "log", "--stall-timeout", str(STALL_SECONDS), "--keep-alive-interval", "0.5", environ=environ
    )
    try:
        server.wait_until_ready()
        assert ask(server.url).status_code == 200
        metrics = httpx.get(f"{server.url}/metrics").text
        assert re.search(r'^fused_draft_tokens_total{.*drafter="leading".*} [1-9]', metrics, re.MULTILINE)
        seconds = check_the_end(server, lambda: fault(server, tmp_path / "fault"), EXIT_SECONDS)
        assert seconds <= 5 or fault is suspend
        if fault is touch:
            assert "an injected fault" in server.log
    finally:
        for child in server.survivors():
            child.resume()
        server.kill()
