"""What a signal does before the server listens: it ends the start. Imports next to nothing, since it comes first.

Where something has to be undone an exception does it. Elsewhere the process ends within the handler: an exception would
be lost, with a traceback, where Python cannot raise one (in the callbacks that imports leave to the garbage collector).
"""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, an orchestrator's wish, a closed terminal."""

EXIT_INTERRUPTED = 130
LAST_LINE = "\nultrafuser: interrupted before it was ready\n"


class Interrupted(BaseException):
    """A signal came before the server listened.

    Not KeyboardInterrupt: vLLM swallows that while it waits for its engine, and then waits for ever."""


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Within, a signal ends the process: for what leaves nothing behind, like imports."""
    before = {number: signal.signal(number, _end) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def at_stop_signals(handler: Callable[[int, FrameType | None], Any] | signal.Handlers) -> None:
    """Let one handler see to all of them."""
    for number in STOP_SIGNALS:
        signal.signal(number, handler)


def interrupt(_signal: int, _frame: FrameType | None) -> None:
    """A handler that raises; a second signal does not wait for what is being undone."""
    at_stop_signals(_end)
    raise Interrupted


def _end(_signal: int, _frame: FrameType | None) -> None:
    os.write(2, LAST_LINE.encode())
    os._exit(EXIT_INTERRUPTED)
