"""HTTP servers as child processes: our own and plain vLLM's, started, waited for, and ended with all they started."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import httpx

from benchmarks.command import ENVIRON, Options
from benchmarks.engines import plain_engine_options
from benchmarks.environment import num_cores
from ultrafuser.gating.model.fusion import FusedModelInfo, FusionConfig

START_SECONDS = 600.0
"""How long a server may take until it can generate: several start at once on few cores."""

STOP_SECONDS = 30.0
"""How long a server may take to end by itself; then its process group is killed."""

LOG_TAIL = 3000
"""Characters of a server's output that an error shows."""


class ServerFailed(RuntimeError):
    """A server ended or did not become ready; the message carries the end of its output."""


class ServerProcess:
    """One server on the loopback interface, in a process group of its own."""

    def __init__(
        self,
        arguments: Sequence[str],
        ready_path: str,
        environ: Mapping[str, str] | None = None,
        host: str = "127.0.0.1",
        port: int | None = None,
    ) -> None:
        """`python ARGUMENTS --host HOST --port PORT`, a free one if it is None; `environ` adds to the benchmark's own
        environment."""
        self.port = port or free_port()
        self.url = f"http://{host}:{self.port}"
        self.urls = [self.url]
        self._command = [sys.executable, *arguments, "--host", host, "--port", str(self.port)]
        self._ready_url = self.url + ready_path
        self._environ = {**ENVIRON, **(environ or {})}
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process; it loads in the background."""
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=self._environ,
            process_group=0,  # not a session: Linux 6.18 can let its groups of sessions starve each other
        )

    @property
    def pid(self) -> int:
        """The process id of a started server."""
        assert self._process is not None, "start() comes first"
        return self._process.pid

    def wait_until_ready(self) -> None:
        """Block until the server can generate.

        Raises:
            ServerFailed: it ended, or took too long; with the end of its output.
        """
        assert self._process is not None, "start() comes first"
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise ServerFailed(f"the server ended with status {self._process.returncode}:\n{self._output()}")
            with suppress(httpx.TransportError):
                if self.is_ready():
                    return
            time.sleep(0.25)
        raise ServerFailed(f"the server was not ready after {START_SECONDS:.0f} seconds:\n{self._output()}")

    def is_ready(self) -> bool:
        """Whether it can generate now.

        Raises:
            httpx.TransportError: it does not listen.
        """
        return httpx.get(self._ready_url, timeout=30, trust_env=False).status_code == 200

    def ask_to_end(self) -> None:
        """Begin the end, if it runs at all."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def stop(self) -> None:
        """End the server: ask, wait, and kill what is left of its process group."""
        self.ask_to_end()
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_SECONDS)
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._log.close()

    def _output(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")[-LOG_TAIL:]


@contextmanager
def running(servers: Sequence[ServerProcess]) -> Iterator[None]:
    """Servers that load side by side and run inside the context; all of them have ended after it."""
    try:
        for server in servers:
            server.start()
        for server in servers:
            server.wait_until_ready()
        yield
    finally:
        for server in servers:
            server.ask_to_end()
        for server in servers:
            server.stop()


def fused_server(options: Options, *engine_flags: str) -> ServerProcess:
    """`ultrafuser serve` on the benchmark's fusion."""
    cache = [] if options.cache is None else ["--cache", str(options.cache)]
    return serve(options.fusion, *cache, *engine_flags)


def serve(fusion: str, *flags: str) -> ServerProcess:
    """`ultrafuser serve` on a fusion."""
    return ServerProcess(["-m", "ultrafuser.server", "serve", fusion, *flags], "/ready")


def plain_servers(fusion: FusionConfig, info: FusedModelInfo, *engine_flags: str) -> list[ServerProcess]:
    """One plain vLLM server per specialist, each named after it, with the fusion's engine settings.

    The KV memory is divided among them, as one machine must hold all. On the CPU vLLM would bind the servers' workers
    to the same core; here they are dealt out over the cores.
    """
    servers = []
    for index, specialist in enumerate(fusion.specialists):
        settings = plain_engine_options(fusion, info, index)
        if "kv_cache_memory_bytes" in settings:
            settings["kv_cache_memory_bytes"] //= len(fusion.specialists)
        arguments = ["-m", "vllm.entrypoints.openai.api_server", "--served-model-name", specialist.name]
        environ = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_CPU_OMP_THREADS_BIND": str(index % num_cores())}
        servers.append(ServerProcess([*arguments, *_flags(settings), *engine_flags], "/health", environ))
    return servers


def free_port() -> int:
    """A TCP port of the loopback interface that nobody uses now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _flags(settings: Mapping[str, Any]) -> list[str]:
    """Engine options as command-line flags; what is None is left out."""
    flags = []
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(flag if value else "--no-" + flag.removeprefix("--"))
        elif value is not None:
            flags += [flag, str(value)]
    return flags
