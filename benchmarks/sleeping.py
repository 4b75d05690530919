"""Servers that are real in all but the model: each step of their engines sleeps for a made-up time.

HTTP, admission, templates, tokenizers, vLLM's engine core with our scheduler, its prefix cache and the way of tokens
between the processes are those of `ultrafuser serve`; only vLLM's executor is ours, and computes nothing. Two cores
carry 16 of them: all are forked, engine cores too, from one process that has imported everything once.

Run, by `SleepingServers` only: python -m benchmarks.sleeping SPEC serve FUSION [options] --host 127.0.0.1 --port PORT
"""

import gc
import json
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from types import FrameType

import httpx

from benchmarks.servers import ServerProcess
from ultrafuser.server.settings import vllm_environment

WITHOUT_DRAFTS = ("--speculation", json.dumps({"max_tokens": 0}))
"""A token is an event then, and a gap between events one between tokens."""


@dataclass(frozen=True)
class Pace:
    """What a made-up step takes."""

    step_seconds: float
    """Every step, whatever its batch: the weights are read once."""

    prompt_token_seconds: float
    """In addition, for each token of a prompt that is read and was not found in the cache."""


class SleepingServers(ServerProcess):
    """So many servers as one process with children, at 127.0.0.1, 127.0.0.2 and so on, all at one port."""

    def __init__(self, count: int, pace: Pace, fusion: str, *flags: str) -> None:
        spec = json.dumps({"count": count, **asdict(pace)})
        arguments = ["-m", "benchmarks.sleeping", spec, "serve", fusion, *WITHOUT_DRAFTS, *flags]
        super().__init__(arguments, "/ready")
        self.urls = [f"http://127.0.0.{number}:{self.port}" for number in range(1, count + 1)]

    def is_ready(self) -> bool:
        """Whether all can generate."""
        return all(httpx.get(f"{url}/ready", timeout=30, trust_env=False).status_code == 200 for url in self.urls)


def main(argv: Sequence[str]) -> int:
    """Fork the servers, wait for their end; the worst of their exit statuses."""
    spec = json.loads(argv[0])
    count: int = spec.pop("count")
    arguments, port = argv[1:-4], argv[-1]
    os.environ.update(vllm_environment(os.environ, "info"))
    # Imported once, before the forks, and not by those who only want to start this process.
    from vllm.v1.engine import utils as core_processes

    from benchmarks.sleeping_executor import SleepingExecutor
    from ultrafuser.server.__main__ import main as serve
    from ultrafuser.server.engine.shared import options
    from ultrafuser.server.start import launch  # noqa: F401

    core_processes.get_mp_context = lambda: multiprocessing.get_context("fork")  # on a CPU vLLM insists on new ones
    SleepingExecutor.pace = Pace(**spec)
    options._executor = lambda fusion, spec: f"{SleepingExecutor.__module__}.{SleepingExecutor.__name__}"
    gc.collect()
    gc.freeze()  # else the first collection of each child would copy what all share
    children = [
        _fork(lambda: serve([*arguments, "--host", f"127.0.0.{number}", "--port", port]))  # noqa: B023 - called at once
        for number in range(1, count + 1)
    ]

    def pass_on(number: int, _frame: FrameType | None) -> None:
        for child in children:
            os.kill(child, number)

    signal.signal(signal.SIGTERM, pass_on)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


def _fork(serve: Callable[[], int]) -> int:
    """The process id of a child that serves, in this process; a child never returns."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        status = serve()
    except Exception:
        traceback.print_exc()  # nobody else would: such an end runs no hooks
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
