"""The shipped balancer as a process of its own, in front of replicas at addresses of this machine."""

import os
import re
import socket
import subprocess
from pathlib import Path
from typing import Self

import httpx
import pytest

from deploy.checks.tools import ROOT, NotRun, find_haproxy

FOLDER = ROOT / "deploy" / "balancer"


def free_port(address: str = "127.0.0.1") -> int:
    """A port that nobody listens at now."""
    with socket.create_server((address, 0)) as free:
        return int(free.getsockname()[1])


class Balancer:
    """HAProxy with the shipped files; replica N is at 127.0.0.N, all at one port unless `variables` say otherwise."""

    def __init__(self, log: Path, replica_port: int, config: Path = FOLDER / "haproxy.cfg", **variables: str) -> None:
        """`variables` are those at the top of the configuration."""
        self._log = log
        self.port, self.status_port = free_port(), free_port()
        self.client = httpx.Client(timeout=60)
        """For the requests of one thread at a time."""

        self.url, self._status_url = f"http://127.0.0.1:{self.port}", f"http://127.0.0.1:{self.status_port}"
        environ = {
            "BALANCER_FOLDER": str(FOLDER),
            "BALANCER_BIND": f"127.0.0.1:{self.port}",
            "BALANCER_STATUS_BIND": f"127.0.0.1:{self.status_port}",
            "REPLICA_NAME": "127.0.0.",
            "REPLICA_PORT": str(replica_port),
            **variables,
        }
        try:
            command = [str(find_haproxy()), "-db", "-f", str(config)]
        except NotRun as reason:
            pytest.skip(str(reason))
        with log.open("w") as stream:
            self.process = subprocess.Popen(command, env=os.environ | environ, stdout=stream, stderr=stream)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.process.terminate()
        self.process.wait(20)

    @property
    def log(self) -> str:
        """A line for each request, and what the balancer says of itself."""
        return self._log.read_text()

    def metrics(self) -> str:
        """Its own metrics."""
        assert self.process.poll() is None, self.log
        try:
            return self.client.get(f"{self._status_url}/metrics").text
        except httpx.ConnectError:
            return ""

    def ready(self) -> set[str]:
        """The replicas that conversations are sent to."""
        pattern = r'^haproxy_server_status\{proxy="replicas",server="([\w-]+)",state="UP"\} 1$'
        return set(re.findall(pattern, self.metrics(), re.MULTILINE))

    def is_ready(self) -> bool:
        """What its own probe says."""
        return self.client.get(f"{self._status_url}/ready").status_code == 200

    def metric(self, name: str) -> dict[str, float]:
        """A metric of the replicas' backend, by replica."""
        pattern = rf'^{name}\{{proxy="replicas",server="([\w-]+)"[^}}]*\}} (\S+)$'
        return {server: float(value) for server, value in re.findall(pattern, self.metrics(), re.MULTILINE)}

    def raw(self, request: bytes) -> bytes:
        """What comes back for these very bytes, until the connection is closed."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as connection:
            connection.sendall(request)
            return b"".join(iter(lambda: connection.recv(65536), b""))
