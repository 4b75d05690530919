"""A spawned child leaves the terminal's process group and ends with its parent."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection

import psutil  # type: ignore[import-untyped]
import pytest

from tests.e2e.process import wait_for
from ultrafuser.server.start.children import tied_children

PARENT = """
import sys, time
from multiprocessing import get_context
from ultrafuser.server.start import children
from tests.server.start import test_children
if __name__ == "__main__":
    children.KILL_SECONDS = float(sys.argv[2])
    with children.tied_children():
        child = get_context("spawn").Process(target=getattr(test_children, sys.argv[1]))
        child.start()
    print(child.pid, flush=True)
    time.sleep(600)
"""


def sleep() -> None:
    """End at the first signal."""
    time.sleep(600)


def hang() -> None:
    """Have a child, and end at no signal that can be ignored."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    subprocess.run(["sleep", "600"], check=True)


def report_group(connection: Connection) -> None:
    """Tell the parent the group of this process."""
    connection.send(os.getpgrp())


def group_of_a_child() -> int:
    """The process group of a spawned child."""
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=report_group, args=(sender,))
    child.start()
    group: int = receiver.recv()
    child.join()
    return group


def test_only_children_started_within_have_a_group_of_their_own() -> None:
    with tied_children():
        assert group_of_a_child() != os.getpgrp()
    assert group_of_a_child() == os.getpgrp()


@pytest.mark.parametrize(("work", "kill_seconds"), [(sleep, 600), (hang, 1)])
def test_a_child_ends_when_its_parent_is_killed(work: Callable[[], None], kill_seconds: float) -> None:
    command = [sys.executable, "-c", PARENT, work.__name__, str(kill_seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        wait_for(lambda: os.getpgid(child.pid) == child.pid, "the child has run its first line")
        family = [child]
        if work is hang:
            family += wait_for(child.children, "the child has a child")
        parent.kill()
    wait_for(lambda: not any(_is_running(each.pid) for each in family), "the child ends, too, with all below it")


def _is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
