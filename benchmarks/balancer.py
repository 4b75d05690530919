"""The shipped balancer in front of servers of this machine: HAProxy with the files of deploy/balancer/."""

import os
import shutil
import subprocess
import tempfile
import time
from contextlib import suppress
from types import TracebackType

import httpx

from benchmarks.environment import REPOSITORY
from benchmarks.servers import ServerFailed, free_port

FOLDER = REPOSITORY / "deploy" / "balancer"
START_SECONDS = 30.0
"""How long it may take to have found all servers ready."""


class Balancer:
    """HAProxy while the context lasts; server N is at 127.0.0.N, all of them at one port."""

    def __init__(self, server_port: int, num_servers: int) -> None:
        """
        Raises:
            ServerFailed: HAProxy is not installed.
        """
        program = shutil.which("haproxy", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
        if program is None:
            raise ServerFailed("HAProxy is not installed; on Debian 12: apt-get install haproxy")
        port, self._status_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._num_servers = num_servers
        self._command = [program, "-db", "-f", str(FOLDER / "haproxy.cfg")]
        self._environ = {
            "BALANCER_FOLDER": str(FOLDER),
            "BALANCER_BIND": f"127.0.0.1:{port}",
            "BALANCER_STATUS_BIND": f"127.0.0.1:{self._status_port}",
            "REPLICA_NAME": "127.0.0.",
            "REPLICA_PORT": str(server_port),
        }
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Balancer":
        """Start it, and wait until all servers are among those that requests are sent to.

        Raises:
            ServerFailed: they are not, or it has ended; with the end of its output.
        """
        self._process = subprocess.Popen(
            self._command, env=os.environ | self._environ, stdout=self._log, stderr=subprocess.STDOUT
        )
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            with suppress(httpx.TransportError):
                metrics = httpx.get(f"http://127.0.0.1:{self._status_port}/metrics", timeout=10, trust_env=False).text
                if f'haproxy_backend_active_servers{{proxy="replicas"}} {self._num_servers}' in metrics.splitlines():
                    return self
            time.sleep(0.2)
        self._log.seek(0)
        told = self._log.read().decode(errors="replace")[-3000:]
        self.__exit__(None, None, None)
        raise ServerFailed(f"the balancer does not see {self._num_servers} ready servers:\n{told}")

    @property
    def pid(self) -> int:
        """The process id, once it has started."""
        assert self._process is not None
        return self._process.pid

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it at once."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
        self._log.close()
