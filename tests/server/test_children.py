"""A spawned child leaves the terminal's process group and ends with its parent."""

import os
import subprocess
import sys
from multiprocessing import get_context
from multiprocessing.connection import Connection

from server.children import tied_children
from tests.e2e.process import wait_for

PARENT = """
import time
from multiprocessing import get_context
from server.children import tied_children
if __name__ == "__main__":
    with tied_children():
        child = get_context("spawn").Process(target=time.sleep, args=(600,))
        child.start()
    print(child.pid, flush=True)
    time.sleep(600)
"""


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


def test_a_child_ends_when_its_parent_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        wait_for(lambda: os.getpgid(child) == child, "the child has run its first line")
        parent.kill()
    wait_for(lambda: not _is_running(child), "the child ends, too")


def _is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
