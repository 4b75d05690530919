"""Against the fused model in plain Transformers, batched, cached and in lockstep. A part of `benchmarks.peers`.

Both sides live in one process and use the same cores, weights and number type; both generate greedy token ids.
"""

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.command import Options, say
from benchmarks.measure import Bar, Comparison, Measured, paired_ratio
from benchmarks.stepping import Job, Round, alternate, race
from benchmarks.workload import Request, random_requests
from ultrafuser.gating.model.fusion import FusedModelInfo

if TYPE_CHECKING:
    from benchmarks.engines import StepEngine
    from benchmarks.lockstep import LockstepLoop

BARS = {1: Bar(limit=1.8, direction="at least"), 8: Bar(limit=1.6, direction="at least")}
BARS[32] = Bar(limit=1.4, direction="at least")
BATCHING_BAR = Bar(limit=2.5, direction="at least")


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    batches: tuple[int, ...] = (1, 8, 32)
    prompt_length: int = 64
    num_rounds: int = 6
    num_steps: int = 12
    num_requests: int = 128
    num_slots: int = 32
    shortest: int = 8
    longest: int = 256


QUICK = Sizes(
    batches=(1, 2), prompt_length=16, num_rounds=1, num_steps=2, num_requests=4, num_slots=2, shortest=2, longest=4
)


def compare_with_transformers(options: Options) -> list[Comparison]:
    """Equal lengths, per step, for each batch size; then unequal lengths, static against continuous batches."""
    from benchmarks.engines import fused_engine
    from benchmarks.lockstep import LockstepLoop

    sizes = QUICK if options.quick else Sizes()
    fusion, info = options.load()
    engine = fused_engine(fusion) if options.runs_fused else None
    loop = LockstepLoop(fusion, info) if options.runs_baseline else None
    if loop is not None:
        choose_cache(loop, _equal_requests(info, max(sizes.batches), sizes, seed=100), sizes.num_steps // 2)
    comparisons = []
    for batch in sizes.batches:
        requests = _equal_requests(info, batch, sizes, seed=batch)
        alternate(engine, loop, requests, 1, sizes.num_steps)  # warm-up
        rounds = alternate(engine, loop, requests, sizes.num_rounds, sizes.num_steps)
        comparisons.append(compare_steps(batch, rounds))
        say(f"{comparisons[-1].case}: ratio {comparisons[-1].ratio}")
    comparisons.append(compare_batching(engine, loop, unequal_requests(info, sizes), sizes))
    say(f"{comparisons[-1].case}: ratio {comparisons[-1].ratio}")
    note = f"the loop with its {loop.cache_kind} cache" if loop is not None else None
    return [item.model_copy(update={"note": note}) for item in comparisons]


def choose_cache(loop: "LockstepLoop", requests: Sequence[Request], num_steps: int) -> None:
    """Give the loop the kind of cache with which it is quicker on this machine: which one depends on the sizes."""
    seconds = {}
    for kind in ("dynamic", "static"):
        loop.cache_kind = kind
        alternate(None, loop, requests, 1, num_steps)  # warm-up
        rounds = alternate(None, loop, requests, 1, num_steps)
        seconds[kind] = statistics.median(rounds[0].baseline)
    loop.cache_kind = "dynamic" if seconds["dynamic"] <= seconds["static"] else "static"
    say(f"the Transformers loop uses its {loop.cache_kind} cache: {seconds}")


def compare_steps(batch: int, rounds: Sequence[Round]) -> Comparison:
    """The comparison of one batch size; the ratio is how many times quicker the engine's step is."""
    fused, baseline = [t for r in rounds for t in r.fused], [t for r in rounds for t in r.baseline]
    ratio = None
    if fused and baseline:
        medians = [(statistics.median(r.fused), statistics.median(r.baseline)) for r in rounds]
        ratio = paired_ratio([b for _, b in medians], [f for f, _ in medians])
    return Comparison(
        case=f"Transformers loop, batch {batch}",
        unit="ms per step",
        fused=Measured.of(fused, scale=1000) if fused else None,
        baseline=Measured.of(baseline, scale=1000) if baseline else None,
        ratio=ratio,
        bar=BARS.get(batch),
    )


def compare_batching(
    engine: "StepEngine | None", loop: "LockstepLoop | None", requests: Sequence[Request], sizes: Sizes
) -> Comparison:
    """Requests of unequal length, as many at a time on both sides; the side that is behind runs next."""
    from benchmarks.engines import ContinuousBatching
    from benchmarks.lockstep import StaticBatches

    sides: list[Job] = []
    if engine is not None:
        sides.append(ContinuousBatching(engine, requests, sizes.num_slots))
    if loop is not None:
        sides.append(StaticBatches(loop, requests, sizes.num_slots))
    num_tokens = sum(request.num_tokens for request in requests)
    rates = [Measured(value=num_tokens / seconds) for seconds in race(sides, sizes.num_steps)]
    fused = rates.pop(0) if engine is not None else None
    baseline = rates.pop(0) if loop is not None else None
    return Comparison(
        case=f"{len(requests)} requests of {sizes.shortest} to {sizes.longest} tokens",
        unit="tokens/s",
        fused=fused,
        baseline=baseline,
        ratio=fused.value / baseline.value if fused and baseline else None,
        bar=BATCHING_BAR,
    )


def unequal_requests(info: FusedModelInfo, sizes: Sizes) -> list[Request]:
    """Requests whose prompts and responses have lengths spread evenly over their ranges, in random order."""
    rng = random.Random(0)
    lengths = [rng.randint(sizes.prompt_length // 2, sizes.prompt_length) for _ in range(sizes.num_requests)]
    span = sizes.longest - sizes.shortest
    num_tokens = [sizes.shortest + round(span * i / (sizes.num_requests - 1)) for i in range(sizes.num_requests)]
    rng.shuffle(num_tokens)
    return random_requests(info, lengths, num_tokens, seed=1)


def _equal_requests(info: FusedModelInfo, batch: int, sizes: Sizes, seed: int) -> list[Request]:
    num_tokens = sizes.num_rounds * (sizes.num_steps + 1) + sizes.prompt_length
    return random_requests(info, [sizes.prompt_length] * batch, [num_tokens] * batch, seed)
