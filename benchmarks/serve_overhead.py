"""What HTTP costs: the time between two tokens through the server's stream against the same engine without a server.

Run: python -m benchmarks.serve_overhead [--quick]
"""

import asyncio
import itertools
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import httpx

from benchmarks.command import Options, run_benchmark, say
from benchmarks.measure import Bar, Comparison, Measured, paired_ratio
from benchmarks.result import Question
from benchmarks.workload import Prompts, conversations, render

if TYPE_CHECKING:
    from ultrafuser.server.engine.client.async_llm import FusedAsyncLLM

QUESTION = Question(
    name="serve_overhead",
    text="What does HTTP cost? Time between two tokens of a streamed chat, against the same engine without a server.",
    fused="HTTP stream",
    baseline="in-process engine",
    ratio="HTTP stream / in-process engine",
    method=(
        "A server process and an engine with the same settings in the benchmark's own process answer the same "
        "conversations in turns; between turns both rest until their workers sleep. Numbers are gaps between arrivals; "
        "the ratio is the median over pairs of neighbouring turns of the mean time per token."
    ),
)
BAR = Bar(limit=1.10, direction="at most")

ONE_BY_ONE = {"max_tokens": 0}
"""Both sides without guesses: a gap between arrivals is then that between two tokens."""

REST_SECONDS = 1.5
"""vLLM's workers poll for one second after their last step; the side at rest must not take time from the other."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    concurrency: tuple[int, ...] = (1, 8)
    num_tokens: int = 48
    num_rounds: int = 6


QUICK = Sizes(concurrency=(1, 2), num_tokens=4, num_rounds=1)


class Side(Protocol):
    """Answers conversations, token by token."""

    async def stream(self, index: int, num_tokens: int) -> list[float]:
        """Answer conversation `index` with `num_tokens` tokens; the time at which each piece arrived."""


@dataclass
class Turns:
    """What one side measured."""

    seconds_per_token: list[float] = field(default_factory=list)
    """One entry per turn: mean over the streams."""

    gaps: list[float] = field(default_factory=list)
    """Seconds between neighbouring pieces, of all streams of all turns."""

    def add(self, arrivals: Sequence[Sequence[float]], num_tokens: int) -> None:
        """Add a turn: for each of its streams, when the pieces arrived."""
        self.seconds_per_token.append(statistics.fmean((times[-1] - times[0]) / (num_tokens - 1) for times in arrivals))
        self.gaps += [later - earlier for times in arrivals for earlier, later in itertools.pairwise(times)]


class HttpSide:
    """The server, over HTTP."""

    def __init__(self, client: httpx.AsyncClient, model: str) -> None:
        self._client = client
        self._model = model
        self._conversations = conversations(max(Sizes().concurrency))

    async def stream(self, index: int, num_tokens: int) -> list[float]:
        """When each chunk with text arrived."""
        body = {
            "model": self._model,
            "messages": self._conversations[index],
            "max_tokens": num_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        times = []
        async with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                now = time.perf_counter()
                if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                    times.append(now)
        return times


class EngineSide:
    """The engine, in this process."""

    def __init__(self, engine: "FusedAsyncLLM", prompts: Sequence[Prompts]) -> None:
        self._engine = engine
        self._prompts = prompts
        self._ids = itertools.count()

    async def stream(self, index: int, num_tokens: int) -> list[float]:
        """When each output arrived."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        from ultrafuser.server.engine.shared.extra_args import fused_input

        params = SamplingParams(
            temperature=0.0, max_tokens=num_tokens, ignore_eos=True, output_kind=RequestOutputKind.DELTA
        )
        outputs = self._engine.generate(fused_input(self._prompts[index]), params, f"bench-{next(self._ids)}")
        return [time.perf_counter() async for output in outputs if output.outputs[0].text]


def measure(options: Options) -> list[Comparison]:
    """One comparison per number of concurrent streams."""
    from benchmarks.servers import fused_server, running
    from ultrafuser.server.engine.client.async_llm import FusedAsyncLLM

    sizes = QUICK if options.quick else Sizes()
    fusion, _ = options.load()
    prompts = render(fusion, conversations(max(sizes.concurrency)))
    server = fused_server(options, "--speculation", json.dumps(ONE_BY_ONE))
    with running([server] if options.runs_fused else []):
        engine = FusedAsyncLLM.from_fusion(fusion, {"speculation": ONE_BY_ONE}) if options.runs_baseline else None
        try:
            baseline = None if engine is None else EngineSide(engine, prompts)
            return asyncio.run(_measure(server.url if options.runs_fused else None, fusion.name, baseline, sizes))
        finally:
            if engine is not None:
                engine.shutdown()


async def _measure(url: str | None, model: str, baseline: EngineSide | None, sizes: Sizes) -> list[Comparison]:
    async with httpx.AsyncClient(base_url=url or "", timeout=300, trust_env=False) as client:
        http = HttpSide(client, model) if url is not None else None
        comparisons = []
        for concurrency in sizes.concurrency:
            await alternate(http, baseline, concurrency, sizes.num_tokens, 1)  # warm-up
            turns = await alternate(http, baseline, concurrency, sizes.num_tokens, sizes.num_rounds)
            comparisons.append(compare(concurrency, *turns))
            say(f"{comparisons[-1].case}: ratio {comparisons[-1].ratio}")
        return comparisons


async def alternate(
    fused: Side | None, baseline: Side | None, concurrency: int, num_tokens: int, num_rounds: int
) -> tuple[Turns, Turns]:
    """Let both sides answer `concurrency` conversations at once, in turns; a side that is None is left out."""
    sides = [(fused, Turns()), (baseline, Turns())]
    for index in range(num_rounds):
        for side, turns in sides if index % 2 == 0 else sides[::-1]:
            if side is not None:
                await asyncio.sleep(REST_SECONDS)
                turns.add(await asyncio.gather(*(side.stream(i, num_tokens) for i in range(concurrency))), num_tokens)
    return sides[0][1], sides[1][1]


def compare(concurrency: int, http: Turns, engine: Turns) -> Comparison:
    """The comparison for one number of streams, in milliseconds."""
    both = http.seconds_per_token and engine.seconds_per_token
    return Comparison(
        case=f"{concurrency} concurrent",
        unit="ms between tokens",
        fused=Measured.of(http.gaps, scale=1000) if http.gaps else None,
        baseline=Measured.of(engine.gaps, scale=1000) if engine.gaps else None,
        ratio=paired_ratio(http.seconds_per_token, engine.seconds_per_token) if both else None,
        bar=BAR,
    )


if __name__ == "__main__":
    run_benchmark(QUESTION, measure)
