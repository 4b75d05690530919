"""A Ray cluster over machines, each with the fusion under a path of its own, and blind to the first one's."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from shutil import copytree, rmtree, which
from typing import Any, Self

import psutil  # type: ignore[import-untyped]
import pytest

from tests.e2e.machines import Machines
from tests.e2e.process import ServerProcess, clean_environment, wait_for
from tests.fakes import write_tiny_fusion
from ultrafuser.server.engine.shared.ray_cluster import CPU_RESOURCE

PORT = 6379
START_SECONDS = 120.0
_HIDDEN_FOLDER = 'mount -t tmpfs tmpfs "$0" && exec "$@"'
_WHAT_IS_LEFT = f"""
import json, ray
ray.init(address="auto", log_to_driver=False, logging_level=40)
groups = ray.util.placement_group_table().values()
print(json.dumps({{
    "free": ray.available_resources().get("{CPU_RESOURCE}", 0),
    "groups": [group["state"] for group in groups if group["state"] != "REMOVED"],
    "nodes": sum(node["Alive"] for node in ray.nodes()),
}}))
"""


class RayMachines:
    """So many machines of one Ray cluster, one device each; the server is started on the first, which is the head."""

    def __init__(self, folder: Path, count: int, **fusion: Any) -> None:
        pytest.importorskip("ray", reason="needs Ray: pip install 'ultrafuser[ray]'")
        if which("nsenter") is None:
            pytest.skip("needs nsenter; on Debian: apt-get install util-linux")
        self.machines = Machines(count)
        first = write_tiny_fusion(folder / "machine-0", **fusion)
        copies = [copytree(first.parent, folder / f"machine-{rank}") / first.name for rank in range(1, count)]
        self.fusions = [first, *copies]
        self._folder = folder
        self._ray_folder = Path(tempfile.mkdtemp(prefix="ray-"))  # sockets have short names only
        self._nodes: dict[int, subprocess.Popen[bytes]] = {}
        self._servers: list[ServerProcess] = []

    def __enter__(self) -> Self:
        self.machines.__enter__()
        for rank in range(len(self.fusions)):
            self.start_node(rank)
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.kill()
        for rank in self._nodes:
            self.kill_node(rank)
        self.machines.__exit__()
        rmtree(self._ray_folder, ignore_errors=True)

    def start_node(self, rank: int) -> None:
        """`ray start` on a machine."""
        ray = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats"]
        ray += ["--node-ip-address", self.machines.address(rank), "--num-cpus", "1"]
        ray += ["--resources", json.dumps({CPU_RESOURCE: 1}), "--object-store-memory", "100000000"]
        environment = clean_environment() | {"RAY_DISABLE_MEMORY_MONITOR": "1", "RAY_memory_monitor_refresh_ms": "0"}
        if rank == 0:
            command = [*ray, "--head", "--port", str(PORT), "--include-dashboard", "false"]
            command += ["--temp-dir", str(self._ray_folder)]
        else:
            command = ["sh", "-c", _HIDDEN_FOLDER, str(self.fusions[0].parent), *ray, "--address", self.address]
            environment["ULTRAFUSER_FUSION"] = str(self.fusions[rank])
            environment["ULTRAFUSER_CACHE"] = str(self._folder / f"cache-{rank}")
        log = self._folder / f"ray-{rank}"
        with log.open("w") as stream:
            started = subprocess.Popen(
                [*self.machines.around(rank), *command],
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=environment,
                process_group=0,
            )
        self._nodes[rank] = started

        def is_up() -> bool:
            assert started.poll() is None, log.read_text()
            return "Ray runtime started" in log.read_text()

        wait_for(is_up, f"a Ray node on machine {rank}", START_SECONDS)

    def kill_node(self, rank: int) -> None:
        """End all of a machine's processes of Ray at once, without a word."""
        for process in self.processes(rank):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._nodes[rank].wait(10)

    def processes(self, rank: int, name: str = "") -> list[psutil.Process]:
        """A machine's processes of Ray, ranks among them, whose command line has this part."""
        if self._nodes[rank].poll() is not None:
            return []
        node = psutil.Process(self._nodes[rank].pid)
        found = []
        for process in [*node.children(recursive=True), node]:
            with suppress(psutil.NoSuchProcess):
                if name in " ".join(process.cmdline()):
                    found.append(process)
        return found

    @property
    def address(self) -> str:
        """Of the cluster."""
        return f"{self.machines.address(0)}:{PORT}"

    def serve(self, log: str, *options: str) -> ServerProcess:
        """`ultrafuser serve` on the head."""
        ray = ["--distributed-executor-backend", "ray", "--cache", str(self._folder / "cache-0")]
        server = ServerProcess(
            self.fusions[0],
            self._folder / log,
            *ray,
            *options,
            environ={"RAY_ADDRESS": self.address},
            around=self._beside_the_head(),
        )
        self._servers.append(server)
        return server

    def left(self) -> dict[str, Any]:
        """What the cluster says of itself: free devices, reservations, living nodes."""
        output = subprocess.run(
            [*self._beside_the_head(), sys.executable, "-c", _WHAT_IS_LEFT],
            env=os.environ | {"RAY_ADDRESS": self.address},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        (line,) = [line for line in output.splitlines() if line.startswith("{")]  # Ray may say something, too
        found: dict[str, Any] = json.loads(line)
        return found

    @contextmanager
    def on_the_head(self) -> Iterator[None]:
        """Within, this thread's connections begin there."""
        with self.machines.on(0):
            yield

    def _beside_the_head(self) -> list[str]:
        return ["nsenter", "--target", str(self._nodes[0].pid), "--mount", "--net"]
