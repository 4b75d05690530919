"""Does company change the answer? Kernels round by batch size, in plain vLLM as in the fused engine.

Run: python -m benchmarks.batch_invariance [--quick]
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.command import Options, run_benchmark, say
from benchmarks.measure import Comparison, Measured
from benchmarks.result import Question
from benchmarks.workload import Request, conversations, render

if TYPE_CHECKING:
    from benchmarks.engines import StepEngine

QUESTION = Question(
    name="batch_invariance",
    text="Does a greedy response stay the same among concurrent requests? And in plain vLLM?",
    fused="fused engine",
    baseline="plain vLLM",
    ratio="fused share / plain share",
    method=(
        "Each conversation is answered alone, then all at once, from an empty prefix cache; plain vLLM serves the "
        "first specialist. Reported, not judged: it is a property of the kernels, not of fusing."
    ),
)


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    num_requests: int = 32
    num_tokens: int = 64


QUICK = Sizes(num_requests=2, num_tokens=4)

Responses = Sequence[Sequence[int]]
"""Token ids of each response."""


def measure(options: Options) -> list[Comparison]:
    """Share of equal responses, and share of tokens before the first difference."""
    from benchmarks.engines import fused_engine, plain_engine

    sizes = QUICK if options.quick else Sizes()
    fusion, info = options.load()
    prompts = render(fusion, conversations(sizes.num_requests))
    requests = [Request(own, sizes.num_tokens, may_end_early=True) for own in prompts]
    fused = alone_and_together(fused_engine(fusion), requests) if options.runs_fused else None
    say("fused engine done")
    plain = alone_and_together(plain_engine(fusion, info), requests) if options.runs_baseline else None
    return compare(fused, plain, sizes.num_requests)


def alone_and_together(engine: "StepEngine", requests: Sequence[Request]) -> tuple[Responses, Responses]:
    """The responses to requests that run one by one, and to the same requests at once."""
    alone = []
    for request in requests:
        engine.forget_prefixes()
        alone += engine.finish([request])
    engine.forget_prefixes()
    return alone, engine.finish(requests)


def compare(
    fused: tuple[Responses, Responses] | None, plain: tuple[Responses, Responses] | None, num_requests: int
) -> list[Comparison]:
    """Both shares for both engines."""
    return [
        Comparison(
            case=f"{num_requests} concurrent, {name}",
            unit="share",
            fused=Measured(value=share(*fused)) if fused else None,
            baseline=Measured(value=share(*plain)) if plain else None,
            ratio=share(*fused) / share(*plain) if fused and plain and share(*plain) else None,
        )
        for name, share in (("equal responses", equal_share), ("tokens before a difference", equal_token_share))
    ]


def equal_share(alone: Responses, together: Responses) -> float:
    """Share of responses that are equal to the last token."""
    return statistics.fmean(list(a) == list(b) for a, b in zip(alone, together, strict=True))


def equal_token_share(alone: Responses, together: Responses) -> float:
    """Share of the tokens generated alone that come before the first difference."""
    num_equal = sum(_num_equal(a, b) for a, b in zip(alone, together, strict=True))
    return num_equal / sum(map(len, alone))


def _num_equal(a: Sequence[int], b: Sequence[int]) -> int:
    pairs = enumerate(zip(a, b, strict=False))
    return next((index for index, (left, right) in pairs if left != right), min(len(a), len(b)))


if __name__ == "__main__":
    run_benchmark(QUESTION, measure)
