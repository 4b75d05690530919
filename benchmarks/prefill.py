"""What a long prompt does to others, and they to it: with steps of bounded time, and in one piece.

Run: python -m benchmarks.prefill [--quick]
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from benchmarks.command import Options, run_benchmark, say
from benchmarks.measure import Bar, Comparison, Measured, paired_ratio
from benchmarks.result import Question
from benchmarks.workload import Request, random_requests
from ultrafuser.gating.model.fusion import FusedModelInfo

if TYPE_CHECKING:
    from benchmarks.engines import StepEngine

QUESTION = Question(
    name="prefill",
    text="What does a long prompt do to running streams? Steps of bounded time against the prompt in one piece.",
    fused="bounded steps",
    baseline="one piece",
    ratio="bounded / one piece",
    method=(
        "One engine serves streams, or none, and reads prompts of random tokens that arrive beside them, in turns with "
        "and without the bound (`engine.max_step_seconds`, or 1.5 s); the prefix cache is emptied before each. Gaps "
        "are between tokens of a stream from the prompt's arrival to its first token. Ratios of first tokens are "
        "medians over pairs of turns; gaps are those of all turns."
    ),
)
BAR = Bar(limit=1.15, direction="at most")
"""What the prompt itself may lose."""

DEFAULT_BOUND_SECONDS = 1.5
"""On a GPU, too, where there is no bound by default."""

NUM_OTHER_TOKENS = 40
"""Room beside the longest prompt: what it generates."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    prompt_length: int = 2000
    stream_length: int = 32
    num_streams: int = 4
    num_rounds: int = 2


QUICK = Sizes(prompt_length=96, stream_length=8, num_streams=2, num_rounds=1)


@dataclass(frozen=True)
class Case:
    """What arrives beside what."""

    name: str
    num_streams: int
    num_prompts: int


@dataclass
class Turns:
    """What one side measured in one case."""

    gaps: list[float] = field(default_factory=list)
    """Seconds of each step, in which every stream gets a token."""

    longest: list[float] = field(default_factory=list)
    """The longest gap of each turn."""

    first_tokens: list[list[float]] = field(default_factory=list)
    """Seconds until each prompt's first token, by turn."""


class Side:
    """The engine with or without the bound."""

    def __init__(self, engine: "StepEngine", pace: Any) -> None:
        """`pace` is the scheduler's own, or None."""
        self._engine = engine
        self._pace = pace
        self._scheduler: Any = engine.llm.llm_engine.engine_core.engine_core.scheduler
        self._max_tokens = self._scheduler.max_num_scheduled_tokens

    def read(self, streams: Sequence[Request], prompts: Sequence[Request], turns: Turns) -> None:
        """Let the prompts arrive beside the streams, until each has its first token."""
        self._engine.forget_prefixes()
        self._scheduler._pace = self._pace
        self._scheduler.max_num_scheduled_tokens = self._max_tokens
        self._scheduler.scheduler_config.long_prefill_token_threshold = 0
        self._engine.start(streams)
        for prompt in prompts:
            self._engine.add(prompt)
        gaps, first_tokens = [], [0.0] * len(prompts)
        start = now = time.perf_counter()
        while not all(first_tokens):
            self._engine.step()
            earlier, now = now, time.perf_counter()
            gaps.append(now - earlier)
            for index, token_ids in enumerate(self._engine.token_ids[len(streams) :]):
                first_tokens[index] = first_tokens[index] or (now - start if token_ids else 0.0)
        self._engine.stop()
        turns.gaps += gaps
        turns.longest.append(max(gaps))
        turns.first_tokens.append(first_tokens)


def measure(options: Options) -> list[Comparison]:
    """The gaps of streams and the first tokens of prompts, case by case."""
    # Imported here, so that `--help` and wrong options answer at once.
    from benchmarks.engines import fused_engine

    sizes = QUICK if options.quick else Sizes()
    fusion, info = options.load()
    bound = fusion.engine.max_step_seconds or DEFAULT_BOUND_SECONDS
    engine = fused_engine(fusion, max_step_seconds=bound)
    pace = engine.llm.llm_engine.engine_core.engine_core.scheduler._pace
    bounded = Side(engine, pace) if options.runs_fused else None
    unbounded = Side(engine, None) if options.runs_baseline else None
    cases = [
        Case("alone", 0, 1),
        Case(f"beside {sizes.num_streams} streams", sizes.num_streams, 1),
        Case(f"two beside {sizes.num_streams} streams", sizes.num_streams, 2),
    ]
    _alternate(bounded, unbounded, cases[1], QUICK, info)  # warm-up
    comparisons = []
    for case in cases:
        comparisons += compare(case, *_alternate(bounded, unbounded, case, sizes, info))
        say(f"{case.name}: " + ", ".join(f"{item.case} {item.ratio}" for item in comparisons[-4:]))
    return comparisons


def _alternate(
    bounded: Side | None, unbounded: Side | None, case: Case, sizes: Sizes, info: FusedModelInfo
) -> tuple[Turns, Turns]:
    """Both sides with the same requests, in turns; a side that is None is left out."""
    sides = [(bounded, Turns()), (unbounded, Turns())]
    length = min(sizes.prompt_length, info.max_model_len - NUM_OTHER_TOKENS)
    for index in range(sizes.num_rounds):
        num_tokens = info.max_model_len - sizes.stream_length
        streams = random_requests(
            info, [sizes.stream_length] * case.num_streams, [num_tokens] * case.num_streams, 2 * index
        )
        prompts = random_requests(
            info, [length] * case.num_prompts, [NUM_OTHER_TOKENS] * case.num_prompts, 2 * index + 1
        )
        for side, turns in sides if index % 2 == 0 else sides[::-1]:
            if side is not None:
                side.read(streams, prompts, turns)
    return sides[0][1], sides[1][1]


def compare(case: Case, bounded: Turns, unbounded: Turns) -> list[Comparison]:
    """One case's comparisons, in seconds."""
    comparisons = []
    if case.num_streams:
        comparisons += [_gaps(case, bounded, unbounded), _longest_gap(case, bounded, unbounded)]
    for index in range(case.num_prompts):
        ours, theirs = ([times[index] for times in turns.first_tokens] for turns in (bounded, unbounded))
        which = f"first token, prompt {index + 1}" if case.num_prompts > 1 else "first token"
        comparisons.append(
            Comparison(
                case=f"{case.name}: {which}",
                unit="s",
                fused=Measured.of(ours) if ours else None,
                baseline=Measured.of(theirs) if theirs else None,
                ratio=paired_ratio(ours, theirs) if ours and theirs else None,
                bar=BAR if case.num_prompts == 1 else None,
            )
        )
    return comparisons


def _gaps(case: Case, bounded: Turns, unbounded: Turns) -> Comparison:
    ours = Measured.of(bounded.gaps) if bounded.gaps else None
    theirs = Measured.of(unbounded.gaps) if unbounded.gaps else None
    return Comparison(
        case=f"{case.name}: gap",
        unit="s between tokens",
        fused=ours,
        baseline=theirs,
        ratio=ours.value / theirs.value if ours and theirs else None,
    )


def _longest_gap(case: Case, bounded: Turns, unbounded: Turns) -> Comparison:
    ours, theirs = bounded.longest, unbounded.longest
    return Comparison(
        case=f"{case.name}: longest gap",
        unit="s between tokens",
        fused=Measured(value=max(ours)) if ours else None,
        baseline=Measured(value=max(theirs)) if theirs else None,
        ratio=max(ours) / max(theirs) if ours and theirs else None,
    )


if __name__ == "__main__":
    run_benchmark(QUESTION, measure)
