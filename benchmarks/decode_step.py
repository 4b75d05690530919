"""What fusing costs: the fused decode step against n times the step of one specialist in plain vLLM.

Run: python -m benchmarks.decode_step [--quick]
"""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.command import Options, run_benchmark, say
from benchmarks.measure import Bar, Comparison, Measured, paired_ratio
from benchmarks.result import Question
from benchmarks.stepping import Round, alternate
from benchmarks.workload import random_requests

QUESTION = Question(
    name="decode_step",
    text="What does fusing cost? The fused decode step against n times one specialist's in plain vLLM.",
    fused="fused step",
    baseline="n x single step",
    ratio="fused step / (n x single step)",
    method=(
        "Both engines live in one process and step through batches of equal lengths in blocks that take turns; "
        "the ratio is the median over pairs of neighbouring blocks."
    ),
)
BAR = Bar(limit=1.05, direction="at most")


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    batches: tuple[int, ...] = (1, 8, 32)
    prompt_length: int = 64
    num_rounds: int = 12
    num_steps: int = 12


QUICK = Sizes(batches=(1, 2), prompt_length=16, num_rounds=2, num_steps=2)


def measure(options: Options) -> list[Comparison]:
    """One comparison per batch size."""
    # Imported here, so that `--help` and wrong options answer at once.
    from benchmarks.engines import fused_engine, plain_engine

    sizes = QUICK if options.quick else Sizes()
    fusion, info = options.load()
    fused = fused_engine(fusion) if options.runs_fused else None
    plain = plain_engine(fusion, info) if options.runs_baseline else None
    comparisons = []
    for seed, batch in enumerate(sizes.batches):
        num_tokens = sizes.num_rounds * (sizes.num_steps + 1) + sizes.prompt_length
        requests = random_requests(info, [sizes.prompt_length] * batch, [num_tokens] * batch, seed)
        alternate(fused, plain, requests, 1, sizes.num_steps)  # warm-up
        rounds = alternate(fused, plain, requests, sizes.num_rounds, sizes.num_steps)
        comparisons.append(compare(batch, rounds, len(fusion.specialists)))
        say(f"{comparisons[-1].case}: ratio {comparisons[-1].ratio}")
    return comparisons


def compare(batch: int, rounds: Sequence[Round], num_specialists: int) -> Comparison:
    """The comparison of one batch size, in milliseconds; every single step counts n times."""
    fused = medians(r.fused for r in rounds)
    single = [num_specialists * median for median in medians(r.baseline for r in rounds)]
    return Comparison(
        case=f"batch {batch}",
        unit="ms per step",
        fused=in_milliseconds([t for r in rounds for t in r.fused]),
        baseline=in_milliseconds([num_specialists * t for r in rounds for t in r.baseline]),
        ratio=paired_ratio(fused, single) if fused and single else None,
        bar=BAR,
    )


def medians(blocks: Iterable[Sequence[float]]) -> list[float]:
    """The median of each block's seconds; nothing of a side that was not run."""
    return [statistics.median(seconds) for seconds in blocks if seconds]


def in_milliseconds(seconds: Sequence[float]) -> Measured | None:
    """One side's steps; None if it was not run."""
    return Measured.of(seconds, scale=1000) if seconds else None


if __name__ == "__main__":
    run_benchmark(QUESTION, measure)
