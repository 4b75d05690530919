"""A real server as a child process: start it, wait until it is ready, look into its log, end it."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import httpx
import psutil  # type: ignore[import-untyped]

T = TypeVar("T")

START_SECONDS = 240.0
STOP_SECONDS = 90.0
POLL_SECONDS = 0.2


def clean_environment() -> dict[str, str]:
    """This process's environment without what other tests have set in it for vLLM."""
    foreign = ("VLLM_", "ULTRAFUSER_", "TORCH_", "PYTHONWARNINGS")
    return {name: value for name, value in os.environ.items() if not name.startswith(foreign)}


def wait_for(condition: Callable[[], T], what: str, seconds: float = 30.0) -> T:
    """The first true value of a condition; fails after so many seconds."""
    start = time.monotonic()
    looks = [0.0]
    while not (value := condition()):
        looks.append(round(time.monotonic() - start, 2))
        assert looks[-1] < seconds, f"not within {seconds:.0f} s: {what}; looked at {looks[:20]}"
        time.sleep(POLL_SECONDS)
    return value


class ServerProcess:
    """`ultrafuser serve` in a process group of its own, like a program started in a terminal."""

    def __init__(
        self,
        fusion: Path,
        log: Path,
        *options: str,
        environ: Mapping[str, str] | None = None,
        around: Sequence[str] = (),
    ) -> None:
        """`environ` adds to this process's environment; `around` is a command that becomes the one it is given."""
        self.log_path = log
        command = [*around, sys.executable, "-m", "ultrafuser.server", "serve", str(fusion), "--port", "0", *options]
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                command,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=clean_environment() | dict(environ or {}),
                process_group=0,  # not a session: Linux 6.18 can let its groups of sessions starve each other
            )
        self._seen: dict[int, psutil.Process] = {}

    @property
    def log(self) -> str:
        """Everything the server has said."""
        return self.log_path.read_text()

    @property
    def url(self) -> str:
        """Where it listens; known when it is ready."""
        match = re.search(r"^ready: (\S+)/v1  model", self.log, re.MULTILINE)
        assert match is not None, self.log
        return match[1]

    def wait_for_log(self, text: str) -> None:
        """Wait until the log contains this text."""

        def is_there() -> bool:
            assert self.process.poll() is None or text in self.log, self.log
            return text in self.log

        wait_for(is_there, f"{text!r} in the log", START_SECONDS)

    def wait_until_ready(self) -> None:
        """Wait until it says so."""
        self.wait_for_log("\nready: ")
        self.children()

    def children(self) -> list[psutil.Process]:
        """The processes below it, at any depth; remembered, so that they can be looked for after its end."""
        for child in psutil.Process(self.process.pid).children(recursive=True):
            self._seen[child.pid] = child
        return list(self._seen.values())

    def child(self, name: str) -> psutil.Process:
        """The living process below it whose name has this part; waits until there is one."""

        def found() -> psutil.Process | None:
            for child in self.children():
                with suppress(psutil.NoSuchProcess):  # some live for a moment only
                    if name in child.name():
                        return child
            return None

        return wait_for(found, f"a process {name}", 90)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and wait for the end; the exit status."""
        self.children()
        self.process.send_signal(number)
        return self.process.wait(STOP_SECONDS)

    def survivors(self) -> list[psutil.Process]:
        """Processes it has started and left behind."""
        return [child for child in self._seen.values() if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]

    def kill(self) -> None:
        """End whatever is left of it."""
        if self.process.poll() is None:
            self.children()
            self.process.kill()
            self.process.wait()
        for child in self.survivors():
            child.kill()

    def metric(self, line_start: str) -> float:
        """The value of the first metric whose line begins like this; 0 if there is none."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        found = [line for line in lines if line.startswith(line_start)]
        return float(found[0].split()[-1]) if found else 0.0
