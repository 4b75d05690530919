"""What does a fleet do when too much is asked of it? Conversations arrive at replicas behind the shipped balancer.

Run: python -m benchmarks.fleet [--quick]
"""

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import psutil  # type: ignore[import-untyped]

from benchmarks.arrivals import Answer, Talk, clients
from benchmarks.balancer import Balancer
from benchmarks.command import Options, run_benchmark, say
from benchmarks.environment import num_cores
from benchmarks.footprint import read_metrics
from benchmarks.measure import Bar, Comparison, Measured, percentile
from benchmarks.result import Question
from benchmarks.servers import ServerProcess, free_port, running
from benchmarks.sleeping import WITHOUT_DRAFTS, Pace, SleepingServers
from benchmarks.workload import tiny_fusion

QUESTION = Question(
    name="fleet",
    text=(
        "Does a fleet keep its goodput when more is asked of it than it can do, and how long do those wait whom it "
        "lets in?"
    ),
    fused="at this load",
    baseline="at its best, or at saturation",
    ratio="goodput / the best; p99 / p99 at saturation",
    method=(
        "Conversations of three turns begin as a Poisson stream, whatever the servers do, behind the shipped balancer; "
        "who is turned away leaves. Real servers hold the demo on a core each; engines sleep 120 ms a step and 50 us "
        "for each token of a prompt, all else of these servers is real. Load 1 is what as many clients as all servers "
        "let in get answered. Goodput: answers a second whose first token came within twice the time of a whole "
        "answer to a lone client. First tokens and gaps: of requests that were let in; values are p99."
    ),
)
GOODPUT_BAR = Bar(limit=0.9, direction="at least")
FIRST_TOKEN_BAR = Bar(limit=2.0, direction="at most")
OVERLOAD = 1.25
"""Loads from here on are judged."""

PATIENCE = 2.0
"""A first token is of use within so many times the time of a whole answer to a lone client."""

DRAIN_SECONDS = 6.0
"""After a load, for what it has left; what still waits then counts with the time that it has waited."""

PLACES = 4
"""Requests that each engine computes at once."""

LONG_TOKENS = 200
"""Of a stream whose tokens are what costs."""

FleetName = Literal["16 engines", "4 engines", "2 engines", "2 servers", "1 server"]
"""Engines sleep, servers compute."""

FLEETS: tuple[FleetName, ...] = ("16 engines", "4 engines", "2 servers", "1 server")
QUICK_FLEETS: tuple[FleetName, ...] = ("2 engines",)


class FleetOptions(Options):
    """What is measured."""

    fleet: tuple[FleetName, ...] = ()
    """One of the fleets; repeat for several; default: all."""

    max_num_queued_reqs: int | None = None
    """Unfinished requests that each server takes; default: the server's own."""


PACE = Pace(step_seconds=0.12, prompt_token_seconds=0.00005)
TALK = Talk()


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    loads: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0)
    seconds: float = 16.0
    ramp_seconds: float = 5.0
    """The first seconds of a load, which do not count."""

    search_seconds: float = 8.0
    """For what saturation is, behind the first seconds, and for what a token costs."""

    pace: Pace = PACE
    """Of the engines that sleep."""

    talk: Talk = TALK
    """What clients do."""


SERVERS = Sizes(loads=(1.0, 1.5, 2.0), seconds=24.0, ramp_seconds=6.0)
"""Real ones answer a tenth as many requests."""

QUICK = Sizes(
    loads=(1.0, 3.0),
    seconds=4.0,
    ramp_seconds=1.0,
    search_seconds=2.0,
    pace=Pace(step_seconds=0.03, prompt_token_seconds=0.0002),
    talk=Talk(first_words=8, next_words=4, num_tokens=8, think_seconds=0.1),
)


@dataclass(frozen=True)
class Window:
    """What was seen of one load."""

    load: float
    """Times saturation."""

    begin: float
    """When it begins to count, in seconds of the monotonic clock."""

    end: float
    """When it no longer does."""

    answers: Sequence[Answer]
    """All requests."""

    hit_share: float
    """Prompt tokens that were found in the caches, of all."""

    servers_share: float
    """CPU seconds of the servers in a second."""

    balancer_share: float
    """CPU seconds of the balancer in a second."""

    sender_share: float
    """CPU seconds of the clients in a second."""

    @property
    def counted(self) -> list[Answer]:
        """Requests that were sent within."""
        return [answer for answer in self.answers if self.begin <= answer.sent < self.end]

    @property
    def first_seconds(self) -> list[float]:
        """Of requests that were let in, until the first token, or until their client had waited for long enough."""
        waits = []
        for answer in self.counted:
            if answer.first_seconds is not None:
                waits.append(answer.first_seconds)
            elif answer.left is not None:
                waits.append(answer.left - answer.sent)
        return waits

    @property
    def gaps(self) -> list[float]:
        """Between tokens."""
        return [gap for answer in self.counted for gap in answer.gaps]

    @property
    def refused_share(self) -> float:
        """Of the requests, those that were turned away."""
        return sum(answer.is_refused for answer in self.counted) / max(len(self.counted), 1)

    def goodput(self, patience: float) -> float:
        """Answers a second that were whole, and begun within so many seconds."""
        good = [
            answer
            for answer in self.answers
            if answer.ended is not None
            and self.begin <= answer.ended < self.end
            and answer.first_seconds is not None
            and answer.first_seconds <= patience
        ]
        return len(good) / (self.end - self.begin)

    @property
    def note(self) -> str:
        """What else there is to say of it."""
        count, seconds = len(self.counted), self.end - self.begin
        late = percentile([answer.late_seconds for answer in self.counted], 0.99) * 1000 if count else 0
        lost = sum(answer.is_lost for answer in self.answers)
        return (
            f"{count / seconds:.1f} requests/s, {self.refused_share:.0%} refused, {lost} lost, {self.hit_share:.0%} of "
            f"prompts cached; {self.servers_share:.2f} cores for servers, {self.balancer_share:.3f} for the balancer, "
            f"{self.sender_share:.2f} for the clients, who are {late:.0f} ms late"
        )


@dataclass(frozen=True)
class Place:
    """A running fleet."""

    urls: Sequence[str]
    """Of each server."""

    pids: Sequence[int]
    """Of the processes that all servers are below."""

    balancer: Balancer
    """In front of them."""

    def cpu_seconds(self) -> tuple[float, float, float]:
        """Until now, of servers, balancer and clients."""
        return _cpu_seconds(self.pids), _cpu_seconds([self.balancer.pid]), time.process_time()


def measure(options: FleetOptions) -> Iterator[Comparison]:
    """Every fleet at every load."""
    with tiny_fusion() as tiny:
        for name in options.fleet or (QUICK_FLEETS if options.quick else FLEETS):
            count, is_real = int(name.split()[0]), name.endswith(("server", "servers"))
            sizes = QUICK if options.quick else SERVERS if is_real else Sizes()
            servers = _real(count, options) if is_real else _sleeping(count, tiny, sizes.pace, options)
            urls = [url for server in servers for url in server.urls]
            with running(servers), Balancer(servers[0].port, count) as balancer:
                place = Place(urls, [server.pid for server in servers], balancer)
                yield from asyncio.run(_measure(name, place, sizes))


def _sleeping(count: int, fusion: str, pace: Pace, options: FleetOptions) -> list[ServerProcess]:
    return [SleepingServers(count, pace, fusion, *_flags(options), "--num-gpu-blocks-override", "1024")]


def _real(count: int, options: FleetOptions) -> list[ServerProcess]:
    """A core for each; with more servers than cores they share them."""
    options.load()  # prepares the models, which all servers share
    cache = [] if options.cache is None else ["--cache", str(options.cache)]
    flags = [*WITHOUT_DRAFTS, *cache, *_flags(options), "--kv-cache-memory-bytes", str(2**29)]
    arguments, port = ["-m", "ultrafuser.server", "serve", options.fusion, *flags], free_port()
    return [
        ServerProcess(
            arguments, "/ready", {"VLLM_CPU_OMP_THREADS_BIND": str(number % num_cores())}, f"127.0.0.{number + 1}", port
        )
        for number in range(count)
    ]


def _flags(options: FleetOptions) -> list[str]:
    limit = options.max_num_queued_reqs
    return ["--max-num-seqs", str(PLACES), *([] if limit is None else ["--max-num-queued-reqs", str(limit)])]


async def _measure(name: str, place: Place, sizes: Sizes) -> list[Comparison]:
    alone_seconds, saturation = await _limits(place, sizes)
    say(f"{name}: an answer alone takes {alone_seconds:.2f} s; saturation at {saturation:.2f} answers/s")
    windows = []
    for load in sizes.loads:
        per_second = load * saturation / sizes.talk.num_turns
        windows.append(await _under_load(load, per_second, place, sizes))
        window = windows[-1]
        firsts, gaps = window.first_seconds or [0.0], window.gaps or [0.0]
        say(
            f"{name}, load {load:g}: goodput {window.goodput(PATIENCE * alone_seconds):.2f}/s, first token "
            f"p50 {percentile(firsts, 0.5):.2f} p99 {percentile(firsts, 0.99):.2f} s, "
            f"gap p50 {percentile(gaps, 0.5):.3f} p99 {percentile(gaps, 0.99):.3f} s; {window.note}"
        )
    return [*compare(name, windows, PATIENCE * alone_seconds), await _cost(name, place, sizes)]


async def _limits(place: Place, sizes: Sizes) -> tuple[float, float]:
    """How long an answer to a lone client takes, and how many a second a closed loop of many gets."""
    talk, url = replace(sizes.talk, think_seconds=0.0), place.balancer.url
    async with clients(url, talk, seed=0) as lone:
        await lone.one_by_one(1)
    alone = [answer.ended - answer.sent for answer in lone.answers if answer.ended is not None]
    async with clients(url, talk, seed=1) as crowd:
        begin = time.monotonic() + sizes.ramp_seconds
        await crowd.crowd(2 * PLACES * len(place.urls), sizes.ramp_seconds + sizes.search_seconds)
    ended = [answer for answer in crowd.answers if answer.ended is not None and answer.ended >= begin]
    return percentile(alone, 0.5), len(ended) / sizes.search_seconds


async def _under_load(load: float, per_second: float, place: Place, sizes: Sizes) -> Window:
    found = _prefixes(place.urls)
    async with clients(place.balancer.url, sizes.talk, seed=int(100 * load)) as arriving:
        begin, used = time.monotonic(), place.cpu_seconds()
        timer = asyncio.create_task(asyncio.sleep(sizes.seconds))
        arrival = asyncio.create_task(arriving.arrive(per_second, sizes.seconds, DRAIN_SECONDS))
        await timer
        seconds = time.monotonic() - begin
        shares = [(after - before) / seconds for after, before in zip(place.cpu_seconds(), used, strict=True)]
        await arrival
    hits, queries = (after - before for after, before in zip(_prefixes(place.urls), found, strict=True))
    return Window(
        load=load,
        begin=begin + sizes.ramp_seconds,
        end=begin + sizes.seconds,
        answers=arriving.answers,
        hit_share=hits / max(queries, 1),
        servers_share=shares[0],
        balancer_share=shares[1],
        sender_share=shares[2],
    )


async def _cost(name: str, place: Place, sizes: Sizes) -> Comparison:
    """CPU time of a token of long streams that fill all places: requests hardly count."""
    talk = replace(sizes.talk, num_turns=1, num_tokens=LONG_TOKENS)
    async with clients(place.balancer.url, talk, seed=2) as streams:
        used = place.cpu_seconds()
        await streams.crowd(PLACES * len(place.urls), sizes.search_seconds)
        spent = [after - before for after, before in zip(place.cpu_seconds(), used, strict=True)]
    num_tokens = sum(len(answer.arrivals) for answer in streams.answers)
    servers, balancer, sender = (1e6 * seconds / num_tokens for seconds in spent)
    note = f"of {num_tokens} tokens; balancer {balancer:.0f} us, clients {sender:.0f} us"
    say(f"{name}: a token costs servers {servers:.0f} us of CPU; {note}")
    return Comparison(
        case=f"{name}: a token of a long stream",
        unit="us of CPU",
        fused=Measured(value=servers),
        baseline=None,
        ratio=None,
        note=note,
    )


def _prefixes(urls: Sequence[str]) -> tuple[float, float]:
    """Tokens that were found in the caches of all servers, and that were looked for."""
    metrics = [read_metrics(url) for url in urls]
    hits, queries = ("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total")
    return sum(own[hits] for own in metrics), sum(own[queries] for own in metrics)


def _cpu_seconds(pids: Sequence[int]) -> float:
    """Of these processes and all below them."""
    parents = [psutil.Process(pid) for pid in pids]
    times = [part.cpu_times() for parent in parents for part in (parent, *parent.children(recursive=True))]
    return sum(own.user + own.system for own in times)


def compare(name: str, windows: Sequence[Window], patience: float) -> list[Comparison]:
    """Goodput, first tokens and gaps of a fleet at each load; the load nearest to 1 is saturation."""
    best = max(window.goodput(patience) for window in windows)
    saturated = min(windows, key=lambda window: abs(window.load - 1))
    comparisons = []
    for window in windows:
        case, is_judged = f"{name}, load {window.load:g}", window.load >= OVERLOAD
        goodput = window.goodput(patience)
        comparisons.append(
            Comparison(
                case=f"{case}: goodput",
                unit="answers/s",
                fused=Measured(value=goodput),
                baseline=Measured(value=best),
                ratio=goodput / best if best else None,
                bar=GOODPUT_BAR if is_judged else None,
                note=window.note,
            )
        )
        firsts, at_saturation = _p99(window.first_seconds), _p99(saturated.first_seconds)
        comparisons.append(
            _latency(f"{case}: first token", firsts, at_saturation, FIRST_TOKEN_BAR if is_judged else None)
        )
        comparisons.append(_latency(f"{case}: gap", _p99(window.gaps), _p99(saturated.gaps), None))
    return comparisons


def _p99(seconds: Sequence[float]) -> Measured | None:
    """Its value is the 99th percentile; in milliseconds."""
    if not seconds:
        return None
    measured = Measured.of(seconds, scale=1000)
    return measured.model_copy(update={"value": measured.p99})


def _latency(case: str, ours: Measured | None, saturated: Measured | None, bar: Bar | None) -> Comparison:
    ratio = ours.value / saturated.value if ours and saturated else None
    return Comparison(case=case, unit="ms", fused=ours, baseline=saturated, ratio=ratio, bar=bar)


if __name__ == "__main__":
    run_benchmark(QUESTION, measure, FleetOptions)
