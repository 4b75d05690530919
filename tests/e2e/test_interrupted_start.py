"""A signal at any moment of the start ends it: status 0 or 130, no traceback, and no process is left."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.process import START_SECONDS, STOP_SECONDS, clean_environment, wait_for

pytestmark = pytest.mark.slow

NUM_MOMENTS = 20
BORDERS = {
    "step 1 begins": "[1/4] import vLLM ...",
    "step 1 ends": "[1/4] import vLLM: ",
    "step 2 begins": "[2/4] ",
    "step 2 ends": "[2/4] prepare weights: ",
    "step 3 begins": "[3/4] ",
    "step 3 ends": "[3/4] load all specialists into one engine: ",
    "step 4 begins": "[4/4] ",
    "step 4 ends": "[4/4] generate a first token: ",
    "ready": "ready: ",
}
"""What the start says where one stage ends and the next begins."""


class Start:
    """`ultrafuser serve` until a signal, in a process group of its own, like a program started in a terminal.

    What it says comes through a pipe that its children hold, too: it ends with the last of them.
    """

    def __init__(self, fusion: Path) -> None:
        command = [sys.executable, "-m", "ultrafuser.server", "serve", str(fusion), "--port", "0"]
        self.said: list[str] = []
        self._process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=clean_environment(),
            process_group=0,
        )

    def __enter__(self) -> "Start":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate(timeout=STOP_SECONDS)

    def read_until(self, border: str) -> None:
        """Read what it says up to the line that begins like this."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.said.append(line)
            if line.startswith(border):
                return
        raise AssertionError("".join(self.said))

    def wait_for_its_handlers(self) -> None:
        """Wait until it says what a signal does; before, that is Python's affair."""

        def handles_signals() -> bool:
            status = Path(f"/proc/{self._process.pid}/status").read_text()
            caught = int(re.findall(r"^SigCgt:\s*(\w+)$", status, re.MULTILINE)[0], 16)
            return bool(caught & 1 << signal.SIGTERM - 1)

        wait_for(handles_signals, "it handles SIGTERM", START_SECONDS)

    def check_that_it_ends(self, number: signal.Signals) -> None:
        """Ctrl-C signals every process of a terminal's group, an orchestrator the first one."""
        if number == signal.SIGINT:
            os.killpg(self._process.pid, number)
        else:
            self._process.send_signal(number)
        self.said.append(self._process.communicate(timeout=STOP_SECONDS)[0])
        said = "".join(self.said)
        assert self._process.returncode in (0, 130), said
        assert "Traceback" not in said, said
        assert "Exception ignored" not in said, said


def at_borders() -> list[Any]:
    """Each border with each signal; what is always run takes no engine, which others end (test_faults, test_lifecycle,
    and with a scripted engine test_launch)."""
    early = {("step 1 begins", signal.SIGTERM), ("step 2 begins", signal.SIGINT), ("step 3 begins", signal.SIGTERM)}
    pairs = product(BORDERS, (signal.SIGINT, signal.SIGTERM))
    return [pytest.param(*pair, marks=[] if pair in early else pytest.mark.long) for pair in pairs]


@pytest.mark.parametrize(("border", "number"), at_borders())
def test_a_signal_at_a_stages_border_ends_the_start(tiny_fusion: Path, border: str, number: signal.Signals) -> None:
    with Start(tiny_fusion) as start:
        start.read_until(BORDERS[border])
        start.check_that_it_ends(number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_before_the_first_line_ends_the_start(tiny_fusion: Path, number: signal.Signals) -> None:
    """The command's own imports took a second, in which Ctrl-C left a traceback, and SIGTERM status 143."""
    with Start(tiny_fusion) as start:
        start.wait_for_its_handlers()
        start.check_that_it_ends(number)


@pytest.fixture(scope="module")
def start_seconds(tiny_fusion: Path) -> float:
    """How long a start takes here."""
    with Start(tiny_fusion) as start:
        start.wait_for_its_handlers()
        begin = time.monotonic()
        start.read_until(BORDERS["ready"])
        seconds = time.monotonic() - begin
        start.check_that_it_ends(signal.SIGTERM)
    return seconds


@pytest.mark.long
@pytest.mark.parametrize("share", [round(random.Random(index).random(), 3) for index in range(NUM_MOMENTS)])
def test_a_signal_at_a_random_moment_ends_the_start(tiny_fusion: Path, start_seconds: float, share: float) -> None:
    with Start(tiny_fusion) as start:
        start.wait_for_its_handlers()
        time.sleep(share * start_seconds)
        start.check_that_it_ends(signal.SIGTERM if int(1000 * share) % 2 else signal.SIGINT)
