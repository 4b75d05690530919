"""A server of the demo for the time of a chat: started, waited for, ended. Does not know what is asked of it."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import IO

from ultrafuser.server.settings import PREFIX, EngineStartError
from ultrafuser.server.start.children import END_WITH_THE_PARENT

STOP_SECONDS = 30.0
"""How long it may take to end by itself."""

_COMMAND = "import sys; from ultrafuser.server.__main__ import main; sys.exit(main())"


@contextmanager
def demo_server(environ: Mapping[str, str]) -> Iterator[str]:
    """The base URL of a server of its own, on a free port; what its start says goes to stderr.

    It is out of the terminal's reach: Ctrl-C is for the chat. If this process is killed it ends, too (on Linux).

    Raises:
        EngineStartError: it has not started, and has said why.
    """
    tie = END_WITH_THE_PARENT if sys.platform == "linux" else ""
    own = {name: value for name, value in environ.items() if not name.startswith(PREFIX) or name == f"{PREFIX}CACHE"}
    with subprocess.Popen(
        [sys.executable, "-c", tie + _COMMAND, "serve", "demo", "--port", "0", "--log-level", "warning"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=own,
        process_group=0,
    ) as process:
        try:
            assert process.stderr is not None
            yield _wait(process.stderr)
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


def _wait(lines: IO[str]) -> str:
    """Pass its lines on until one says where it is."""
    for line in lines:
        print(line, end="", file=sys.stderr, flush=True)
        if match := re.match(r"ready: (\S+)  model", line):
            # It goes on to write, and would stand still if nobody read.
            threading.Thread(target=lambda: all(lines), daemon=True).start()
            return match[1]
    raise EngineStartError("the demo has not started; its own lines above say why")
