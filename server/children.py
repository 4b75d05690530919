"""How the engine's processes are started: out of a terminal's reach, and never outliving this process.

Ctrl-C in a terminal signals every process of the foreground group. The engine must not end then: this process lets
running requests finish first. And vLLM's engine core does not notice that its parent was killed; it would hold its
memory for ever. Knows processes, not what runs in them.
"""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import spawn

# What a child runs before anything else. PR_SET_PDEATHSIG is 1 in Linux' prctl.h.
_LEAVE_THE_TERMINALS_GROUP = "import os; os.setpgrp(); "
_END_WITH_THE_PARENT = f"import ctypes; ctypes.CDLL(None).prctl(1, {int(signal.SIGTERM)}); "


@contextmanager
def tied_children() -> Iterator[None]:
    """Processes that are spawned within have a group of their own and get SIGTERM when this process dies (on Linux)."""
    make_command = spawn.get_command_line

    def make_tied_command(**kwargs: object) -> list[str]:
        command = make_command(**kwargs)
        if "-c" in command:
            command[command.index("-c") + 1] = prologue + command[command.index("-c") + 1]
        return command

    prologue = (_END_WITH_THE_PARENT if sys.platform == "linux" else "") + _LEAVE_THE_TERMINALS_GROUP
    spawn.get_command_line = make_tied_command
    try:
        yield
    finally:
        spawn.get_command_line = make_command
