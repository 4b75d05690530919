"""Does anything get lost or leak? Thousands of short requests, a fifth of whose clients leave, on one server.

Run: python -m benchmarks.soak [--requests N] [--concurrency N] [--quick]

The model is the tests' tiny random one: the server, not the arithmetic, is under test. What it holds (memory, files,
threads, KV blocks) is measured when it is warm and again at the end.
"""

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import httpx

from benchmarks.command import say
from benchmarks.environment import Environment, describe_environment
from benchmarks.footprint import Footprint, look_at
from benchmarks.measure import Frozen
from benchmarks.result import RESULTS_FOLDER, today
from benchmarks.servers import ServerProcess, running, serve
from benchmarks.storm import Counts, Storm
from benchmarks.workload import tiny_fusion
from ultrafuser.gating.files import write_json

NAME = "soak"
NUM_REQUESTS, NUM_CONCURRENT, LEAVING_SHARE = 20_000, 64, 0.2
NUM_PARTS = 10
WARM_UP_SHARE = 0.5
"""Of the requests, sent in addition before the first look: the worker's memory grows for some thousand requests, until
the kernels have met every shape and every page of the KV cache was used; that of the other processes hardly."""

QUICK_REQUESTS = 500
MAX_GROWTH = 0.05
"""Growth of memory between the first and the last look that is no leak; files and threads may not grow at all."""

SETTLE_SECONDS = 15.0
"""How long the server may take to close what the last clients left; idle connections are kept for 5 seconds."""


class Soak(Frozen):
    """One run."""

    date: str
    """Day of the run, UTC, YYYY-MM-DD."""

    num_concurrent: int
    """Requests at once."""

    leaving_share: float
    """Share of the clients that leave before their response is complete."""

    counts: Counts
    """How the requests ended."""

    seconds: float
    """How long it took, without the warm-up."""

    looks: tuple[Footprint, ...]
    """What the server held: when it was warm, then after each tenth of the requests."""

    environment: Environment
    """Where."""

    @property
    def is_ok(self) -> bool:
        """Whether nothing was lost and nothing leaked."""
        first, last = self.looks[0], self.looks[-1]
        return (
            self.counts.lost == self.counts.refused == 0
            and last.is_idle
            and last.rss_bytes <= first.rss_bytes * (1 + MAX_GROWTH)
            and last.num_fds <= first.num_fds
            and last.num_threads <= first.num_threads
        )


def describe(soak: Soak) -> str:
    """The result as Markdown."""
    counts = soak.counts
    told = (
        f"{counts.total} requests, {soak.num_concurrent} at once, half of them streams, at most 8 tokens each, in"
        f" {soak.seconds:.0f} s: {counts.completed} complete, {counts.left} left by their client, {counts.refused}"
        f" refused, **{counts.lost} lost**. The server held:"
    )
    header = ["after", "memory, MiB", "open files", "threads", "KV blocks in use", "running", "waiting"]
    first, last = (_row(look) for look in (soak.looks[0], soak.looks[-1]))
    lines = [header, ["---"] * len(header), first, *(_row(look) for look in soak.looks[1:-1]), last]
    verdict = f"Memory may grow by {MAX_GROWTH:.0%}, the rest not at all: **{'met' if soak.is_ok else 'not met'}**."
    return "\n\n".join([told, "\n".join(f"| {' | '.join(line)} |" for line in lines), verdict])


def main(argv: Sequence[str]) -> int:
    """Run, file the result, print the verdict as JSON; the exit status is 0 whatever it is."""
    options = _parse(argv)
    environment = describe_environment(f"benchmarks.{NAME}", argv)
    with tiny_fusion() as fusion:
        server = serve(fusion)
        with running([server]):
            soak = asyncio.run(_soak(server, options.requests, options.concurrency, environment))
    path: Path | None = None
    if options.results is not None:
        path = options.results / f"{soak.date}-{NAME}.json"
        write_json(path, soak.model_dump(mode="json"))
    counts = soak.counts.model_dump()
    print(json.dumps({"name": NAME, **counts, "ok": soak.is_ok, "file": str(path) if path else None}))
    return 0


async def _soak(server: ServerProcess, num_requests: int, num_concurrent: int, environment: Environment) -> Soak:
    limits = httpx.Limits(max_connections=num_concurrent)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, trust_env=False, limits=limits) as client:
        storm = Storm(client, num_concurrent, LEAVING_SHARE)
        await storm.send(max(num_concurrent, int(num_requests * WARM_UP_SHARE)))
        looks = [await _settled_look(server, 0)]
        storm.counts = Counts()
        seconds = 0.0
        for part in range(1, NUM_PARTS + 1):
            start = time.monotonic()
            await storm.send(num_requests * part // NUM_PARTS - storm.counts.total)
            seconds += time.monotonic() - start
            looks.append(await _settled_look(server, storm.counts.total))
            say(f"{storm.counts.total} of {num_requests}: {looks[-1]}")
    return Soak(
        date=today(),
        num_concurrent=num_concurrent,
        leaving_share=LEAVING_SHARE,
        counts=storm.counts,
        seconds=seconds,
        looks=tuple(looks),
        environment=environment,
    )


async def _settled_look(server: ServerProcess, num_requests: int) -> Footprint:
    """Once nothing runs and idle connections are closed."""
    deadline = time.monotonic() + SETTLE_SECONDS
    await asyncio.sleep(SETTLE_SECONDS / 2)
    while not (look := look_at(server.pid, server.url, num_requests)).is_idle and time.monotonic() < deadline:
        await asyncio.sleep(0.5)
    return look


def _row(look: Footprint) -> list[str]:
    numbers = (look.num_fds, look.num_threads, f"{look.kv_usage:.0%}", look.num_running, look.num_waiting)
    return [str(look.num_requests), f"{look.rss_bytes / 2**20:.0f}", *map(str, numbers)]


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(f"python -m benchmarks.{NAME}", allow_abbrev=False)
    parser.add_argument("--requests", type=int, help=f"how many (default: {NUM_REQUESTS})")
    parser.add_argument("--concurrency", type=int, default=NUM_CONCURRENT, help="how many at once (default: 64)")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_REQUESTS} requests; files no result")
    parser.add_argument("--results", type=Path, help="folder for the result (default: benchmarks/results)")
    options = parser.parse_args(argv)
    if options.results is None and not options.quick:
        options.results = RESULTS_FOLDER
    options.requests = options.requests or (QUICK_REQUESTS if options.quick else NUM_REQUESTS)
    return options


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
