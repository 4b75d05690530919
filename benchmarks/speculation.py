"""What guessing ahead gains: tokens a second with the leading specialist's drafts, against decoding one by one.

A fusion file that says how to speculate (`--fusion trained/head`) is measured as it says.

Run: python -m benchmarks.speculation [--quick]
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.command import Options, run_benchmark, say
from benchmarks.measure import Bar, Comparison, Measured, paired_ratio
from benchmarks.result import Question
from benchmarks.workload import Request, render
from ultrafuser.gating.model.fusion import FusionConfig
from ultrafuser.gating.model.schema import SpeculationSettings

if TYPE_CHECKING:
    from benchmarks.engines import StepEngine

QUESTION = Question(
    name="speculation",
    text="What does guessing ahead gain? Fused decoding with drafts against the same without.",
    fused="with drafts",
    baseline="without",
    ratio="tokens a second with drafts / without, and time a token / that of one specialist in plain vLLM",
    method=(
        "Engines live in one process and take turns at the same questions, which they answer greedily to the end; time "
        "counts from the first token on. The ratio is the median over pairs of neighbouring blocks."
    ),
)
MAX_DRAFTS = 4
GAIN_OF_ONE = Bar(limit=1.5, direction="at least")
GAIN_OF_MIXED = Bar(limit=1.1, direction="at least")
NO_LOSS = Bar(limit=0.98, direction="at least")
AGAINST_ONE_MODEL = Bar(limit=2.0, direction="at most")

QUESTIONS = {
    "text": (
        "Explain how a rainbow forms.",
        "Describe a walk by the sea.",
        "Why do people keep cats?",
        "Write a short letter to a friend who moved away.",
        "Summarise the causes of the French Revolution.",
    ),
    "code": (
        "Write a Python function that reverses a linked list.",
        "Write a SQL query that counts the orders of every customer.",
        "Write a JavaScript function that debounces another.",
        "Write a Python class for a stack.",
        "Write a shell script that renames files to lower case.",
    ),
    "math": (
        "A train travels 120 km in 1.5 hours. What is its average speed?",
        "What is 15% of 240? Show the steps.",
        "Solve 3x + 7 = 22.",
        "A box has 4 red and 6 blue balls. What is the chance of two red ones?",
        "The sides of a right triangle are 6 and 8. How long is the third?",
    ),
}


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    single: tuple[str, ...] = ("text", "code", "math")
    """Domains that are asked one question at a time."""

    mixed: tuple[int, ...] = (4, 16, 32)
    """Batches with questions of all domains."""

    num_tokens: int = 64
    num_blocks: int = 5


QUICK = Sizes(single=("text",), mixed=(4,), num_tokens=32, num_blocks=3)


@dataclass(frozen=True)
class Block:
    """One batch of answers."""

    num_tokens: int
    num_steps: int
    seconds: float


def measure(options: Options) -> list[Comparison]:
    """Comparisons with decoding one by one, and of single questions with one specialist."""
    # Imported here, so that `--help` and wrong options answer at once.
    from benchmarks.engines import fused_engine, plain_engine

    sizes = QUICK if options.quick else Sizes()
    fusion, info = options.load()
    engines = {}
    if options.runs_fused:
        speculation = fusion.engine.speculation or SpeculationSettings(max_tokens=MAX_DRAFTS)
        engines["drafts"] = fused_engine(_with(fusion, speculation))
    if options.runs_baseline:
        engines["without"] = fused_engine(_with(fusion, None))
        engines["one model"] = plain_engine(_with(fusion, None), info)
    comparisons = []
    for domain in sizes.single:
        blocks = take_turns(engines, _questions(fusion, [QUESTIONS[domain]], 1, sizes))
        comparisons.append(compare_rates(f"{domain}, 1 at a time", blocks, GAIN_OF_ONE))
        comparisons.append(compare_times(f"{domain}, 1 at a time, one specialist", blocks))
    for batch in sizes.mixed:
        asked = _questions(fusion, list(QUESTIONS.values()), batch, sizes)
        # The third engine stays: vLLM would take the process's communication groups away with the first that ends.
        fused = {name: engine for name, engine in engines.items() if name != "one model"}
        blocks = take_turns(fused, asked)
        bar = GAIN_OF_MIXED if batch == sizes.mixed[0] else NO_LOSS
        comparisons.append(compare_rates(f"mixed, {batch} at a time", blocks, bar))
    return comparisons


def take_turns(engines: "dict[str, StepEngine]", asked: Sequence[Sequence[Request]]) -> dict[str, list[Block]]:
    """Blocks by engine; the first batch of questions is a warm-up."""
    blocks: dict[str, list[Block]] = {name: [] for name in engines}
    for index, requests in enumerate(asked):
        order = list(engines.items())
        for name, engine in order if index % 2 else order[::-1]:
            block = answer(engine, requests)
            if index:
                blocks[name].append(block)
    return blocks


def answer(engine: "StepEngine", requests: Sequence[Request]) -> Block:
    """Have requests answered to their ends."""
    engine.forget_prefixes()
    engine.start(requests)
    num_first = sum(map(len, engine.token_ids))
    num_steps, start = 0, time.perf_counter()
    while not engine.is_idle:
        engine.step()
        num_steps += 1
    seconds = time.perf_counter() - start
    return Block(sum(map(len, engine.token_ids)) - num_first, num_steps, seconds)


def compare_rates(case: str, blocks: dict[str, list[Block]], bar: Bar) -> Comparison:
    """Tokens a second with drafts and without."""
    with_drafts, without = (_rates(blocks.get(name, [])) for name in ("drafts", "without"))
    steps = [block.num_tokens / block.num_steps for block in blocks.get("drafts", []) if block.num_steps]
    comparison = Comparison(
        case=case,
        unit="tokens per second",
        fused=Measured.of(with_drafts) if with_drafts else None,
        baseline=Measured.of(without) if without else None,
        ratio=paired_ratio(with_drafts, without) if with_drafts and without else None,
        bar=bar,
        note=f"{sum(steps) / len(steps):.2f} tokens a step with drafts" if steps else None,
    )
    say(f"{case}: ratio {comparison.ratio}, {comparison.note}")
    return comparison


def compare_times(case: str, blocks: dict[str, list[Block]]) -> Comparison:
    """Time a token with drafts, and of one specialist alone."""
    drafts, one = ([1000 / rate for rate in _rates(blocks.get(name, []))] for name in ("drafts", "one model"))
    comparison = Comparison(
        case=case,
        unit="ms per token",
        fused=Measured.of(drafts) if drafts else None,
        baseline=Measured.of(one) if one else None,
        ratio=paired_ratio(drafts, one) if drafts and one else None,
        bar=AGAINST_ONE_MODEL,
    )
    say(f"{case}: ratio {comparison.ratio}")
    return comparison


def _rates(blocks: Sequence[Block]) -> list[float]:
    return [block.num_tokens / block.seconds for block in blocks]


def _with(fusion: FusionConfig, speculation: SpeculationSettings | None) -> FusionConfig:
    return fusion.model_copy(update={"engine": fusion.engine.model_copy(update={"speculation": speculation})})


def _questions(fusion: FusionConfig, domains: Sequence[Sequence[str]], batch: int, sizes: Sizes) -> list[list[Request]]:
    """A batch of questions for the warm-up and for each block, from all domains in turn; other ones each time."""
    texts = [question for row in zip(*domains, strict=True) for question in row]
    asked = []
    for index in range(sizes.num_blocks + 1):
        chosen = [texts[(index * batch + place) % len(texts)] for place in range(batch)]
        prompts = render(fusion, [[{"role": "user", "content": text}] for text in chosen])
        asked.append([Request(own, sizes.num_tokens, may_end_early=True) for own in prompts])
    return asked


if __name__ == "__main__":
    run_benchmark(QUESTION, measure)
