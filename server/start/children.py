"""How the engine's processes are started: out of a terminal's reach, and never outliving this process.

Ctrl-C in a terminal signals every process of the foreground group. The engine must not end then: this process lets
running requests finish first. And vLLM's engine core does not notice that its parent was killed; it would hold its
memory for ever. It is told to end, and if it has not done so a while later, it and all below it are killed. Knows
processes, not what runs in them.
"""

import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import active_children, spawn

KILL_SECONDS = 20.0
"""How long children have for their end after this process has died."""

ORPHAN_SECONDS = 3.0
"""How long the children of a child that was killed have for their end."""

# What a child runs before anything else: it is told of the parent's end, leaves the terminal's group, and only then may
# kill its own. PR_SET_PDEATHSIG is 1 in Linux' prctl.h.
END_WITH_THE_PARENT = f"import ctypes; ctypes.CDLL(None).prctl(1, {int(signal.SIGTERM)})\n"
_LEAVE_THE_TERMINALS_GROUP = "import os; os.setpgrp()\n"
# At its end Python looks for cycles among all objects: with vLLM's ten seconds, for memory that is freed anyway.
_END_QUICKLY = "import atexit, gc; atexit.register(gc.freeze)\n"
_KILL_WHAT_OUTLIVES_THE_PARENT = f"""
import threading, time
def outlive(parent, seconds):
    while os.getppid() == parent:
        time.sleep(1)
    time.sleep(seconds)
    os.killpg(0, {int(signal.SIGKILL)})
threading.Thread(target=outlive, args=({{parent}}, {{seconds}}), daemon=True).start()
"""


@contextmanager
def tied_children() -> Iterator[None]:
    """Processes that are spawned within have a group of their own, and end when this process dies (on Linux).

    They get SIGTERM at once, and their group is killed if they are still there `KILL_SECONDS` later.
    """
    make_command = spawn.get_command_line

    def make_tied_command(**kwargs: object) -> list[str]:
        command = make_command(**kwargs)
        if "-c" in command:
            command[command.index("-c") + 1] = prologue + command[command.index("-c") + 1]
        return command

    prologue = _LEAVE_THE_TERMINALS_GROUP + _END_QUICKLY
    if sys.platform == "linux":
        kill = _KILL_WHAT_OUTLIVES_THE_PARENT.format(parent=os.getpid(), seconds=KILL_SECONDS)
        prologue = END_WITH_THE_PARENT + prologue + kill
    spawn.get_command_line = make_tied_command
    try:
        yield
    finally:
        spawn.get_command_line = make_command


def kill_children() -> set[int]:
    """Kill the living tied children, not what is below them; returns their groups, which have their numbers."""
    groups = {child.pid for child in active_children() if child.pid is not None and _group_of(child.pid) == child.pid}
    for group in groups:
        with suppress(ProcessLookupError):
            os.kill(group, signal.SIGKILL)
    return groups


def end_groups(groups: Iterable[int]) -> None:
    """See that nothing is left of these groups: what waits for another machine does not notice its parent's end."""
    deadline = time.monotonic() + ORPHAN_SECONDS
    for group in groups:
        with suppress(ProcessLookupError):
            while time.monotonic() < deadline:
                os.killpg(group, 0)
                time.sleep(0.1)
            os.killpg(group, signal.SIGKILL)


def _group_of(pid: int) -> int | None:
    with suppress(ProcessLookupError):
        return os.getpgid(pid)
    return None
