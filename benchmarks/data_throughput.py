"""Does the data pipeline keep a server busy? A whole run at 64 calls at a time, against the server's own time.

Run: python -m benchmarks.data_throughput [--quick]
"""

import asyncio
import heapq
import itertools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.command import Options, run_benchmark
from benchmarks.measure import Bar, Comparison, Measured
from benchmarks.result import Question
from benchmarks.timed_model import MODEL, Served, timed_model

QUESTION = Question(
    name="data_throughput",
    text="Does `ultrafuser data make` keep a server busy? A whole run with 64 calls at a time.",
    fused="the run",
    baseline="the server's own time",
    ratio="the run / the server's own time",
    method=(
        "A made-up server in a process of its own takes four seconds for a call on average, as a few hundred tokens "
        "would, and notes when it worked. Its own time is what 64 callers without any work of their own would need for "
        "the same calls, stage after stage; "
        "the run's is from the first call to the last answer, with all its client, filters, duplicates and files. The "
        "last row holds the run against a server that is never left with fewer than 64 calls: what waiting between "
        "stages costs, less in a larger run."
    ),
)
BAR = Bar(limit=1.05, direction="at most")
CONCURRENCY = 64


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    call_seconds: float = 4.0
    sub_topics: int = 2
    instructions: int = 12


QUICK = Sizes(call_seconds=0.02, sub_topics=1, instructions=1)


def measure(options: Options) -> list[Comparison]:
    """The responses, which are most of the calls; the whole run; and the run against a full server."""
    sizes = QUICK if options.quick else Sizes()
    with timed_model(sizes.call_seconds) as model, tempfile.TemporaryDirectory() as folder:
        _make(folder, model.base_url, sizes)
        return compare(model.stop(), CONCURRENCY)


def compare(served: Sequence[Served], concurrency: int) -> list[Comparison]:
    """What the calls of a run took, in seconds, and what they needed."""
    by_begin = sorted(served, key=lambda call: call.begin)
    stages = [list(calls) for _, calls in itertools.groupby(by_begin, key=lambda call: call.stage)]
    own = sum(makespan([call.end - call.begin for call in calls], concurrency) for calls in stages)
    busy = sum(call.end - call.begin for call in served) / concurrency
    last = stages[-1]
    last_own = makespan([call.end - call.begin for call in last], concurrency)
    note = f"{len(served):,} calls"
    return [
        _comparison("responses", elapsed(last), last_own, BAR, f"{len(last):,} calls"),
        _comparison("all stages", elapsed(served), own, BAR, note),
        _comparison("all stages, full server", elapsed(served), busy, None, note),
    ]


def makespan(durations: Sequence[float], concurrency: int) -> float:
    """Seconds until all calls are done, if each begins as soon as one of `concurrency` callers is free."""
    free = [0.0] * concurrency
    for duration in durations:
        heapq.heappush(free, heapq.heappop(free) + duration)
    return max(free)


def elapsed(served: Sequence[Served]) -> float:
    """Seconds from the first call to the last answer."""
    return max(call.end for call in served) - min(call.begin for call in served)


def _make(folder: str, base_url: str, sizes: Sizes) -> None:
    from ultrafuser.gating.synthesis.make import make
    from ultrafuser.gating.synthesis.settings import MakeSettings

    settings = MakeSettings(
        output=folder,
        domain=("text", "code", "math"),
        base_url=base_url,
        model=MODEL,
        concurrency=CONCURRENCY,
        meta_topics=4,
        sub_topics=sizes.sub_topics,
        instructions=sizes.instructions,
    )
    asyncio.run(make(settings, settings.structure()))


def _comparison(case: str, run: float, own: float, bar: Bar | None, note: str) -> Comparison:
    fused, baseline = Measured(value=run), Measured(value=own)
    return Comparison(case=case, unit="s", fused=fused, baseline=baseline, ratio=run / own, bar=bar, note=note)


if __name__ == "__main__":
    run_benchmark(QUESTION, measure)
