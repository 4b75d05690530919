"""What guessing ahead gains: tokens a second with drafts, against decoding one by one.

What a fusion file says itself (`--fusion trained/head`) is measured beside what is chosen by default.

Run: python -m benchmarks.speculation [--quick]
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from benchmarks.command import Options, run_benchmark, say
from benchmarks.measure import Bar, Comparison, Measured, paired_ratio
from benchmarks.result import Question
from benchmarks.workload import Request, render
from ultrafuser.gating.model.fusion import FusionConfig
from ultrafuser.gating.model.schema import SpeculationSettings

if TYPE_CHECKING:
    from benchmarks.engines import StepEngine
    from ultrafuser.server.engine.shared.row import Row

QUESTION = Question(
    name="speculation",
    text="What does guessing ahead gain? Fused decoding with drafts against the same without.",
    fused="with drafts",
    baseline="without",
    ratio="tokens a second with drafts / without; against one specialist: time a token / that of it in plain vLLM",
    method=(
        "Engines live in one process and take turns at the same questions, which they answer to their ends, or to the "
        "most tokens; time counts from each answer's second step on. One engine has drafts, whose drafter and number "
        "change between its turns; unnamed ones are chosen step by step, as by default. The ratio is the median over "
        "pairs of neighbouring blocks."
    ),
)
GAIN_OF_ONE = Bar(limit=1.5, direction="at least")
GAIN_OF_MIXED = Bar(limit=1.1, direction="at least")
NO_LOSS = Bar(limit=0.98, direction="at least")
AGAINST_ONE_MODEL = Bar(limit=2.0, direction="at most")

DRAFTERS: tuple[Literal["leading", "ngram"], ...] = ("leading", "ngram")
CHOSEN = SpeculationSettings()
FIXED = {
    f"{drafter}, always {count}": SpeculationSettings(drafter=drafter, min_tokens=count, max_tokens=count)
    for drafter in DRAFTERS
    for count in (2, 4)
}
ONLY = {f"{drafter} alone": SpeculationSettings(drafter=drafter) for drafter in DRAFTERS}

QUESTIONS = {
    "text": [
        f"{task} {subject}."
        for subject in ("a rainbow", "the French Revolution", "cats", "a walk by the sea")
        for task in (
            "Explain in a few sentences",
            "Write a short letter about",
            "Tell a child of",
            "Write a poem about",
        )
    ],
    "code": [
        f"Write a {language} function that {task}."
        for task in ("reverses a linked list", "counts words", "checks for prime numbers", "merges two sorted lists")
        for language in ("Python", "JavaScript", "C", "Rust")
    ],
    "math": [
        text.format(number)
        for number in (12, 30, 45, 240)
        for text in (
            "What is 15% of {}? Show the steps.",
            "Solve 3x + 7 = {}. Show the steps.",
            "A train travels {} km in 1.5 hours. What is its average speed?",
            "The sides of a rectangle are 6 and {}. What are its area and its diagonal?",
        )
    ],
}
"""Sixteen of each: those of a domain in a batch of more are asked more than once."""


@dataclass(frozen=True)
class Case:
    """Questions that are asked together."""

    domain: str
    """A key of `QUESTIONS`, or "mixed": all in turn."""

    batch: int
    temperature: float = 0.0
    is_fixed_too: bool = False
    """Whether fixed numbers of drafts, and single drafters, are measured beside the chosen ones."""

    bar: Bar = NO_LOSS

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.domain}, {self.batch} at a time" + (f", temperature {self.temperature}" * bool(self.temperature))


CASES = (
    *(Case(domain, 1, is_fixed_too=True, bar=GAIN_OF_ONE) for domain in QUESTIONS),
    Case("text", 1, temperature=0.7),
    *(Case(domain, batch) for domain in QUESTIONS for batch in (4, 16)),
    Case("mixed", 4, is_fixed_too=True, bar=GAIN_OF_MIXED),
    Case("mixed", 4, temperature=0.7),
    Case("mixed", 16),
    Case("mixed", 32),
)
QUICK_CASES = (Case("text", 1, bar=GAIN_OF_ONE), Case("mixed", 4, bar=GAIN_OF_MIXED))


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    cases: tuple[Case, ...] = CASES
    num_tokens: int = 64
    num_blocks: int = 5


QUICK = Sizes(QUICK_CASES, num_tokens=32, num_blocks=3)


@dataclass(frozen=True)
class Block:
    """One batch of answers."""

    answers: list[list[int]]
    num_tokens: int
    """Those that came while the clock ran."""

    num_rounds: int
    """Steps in which a request was given tokens, summed over requests."""

    num_drafts: int
    seconds: float


class Drafting:
    """The engine with drafts, whose drafter can be changed while it is idle, and counted."""

    def __init__(self, engine: "StepEngine") -> None:
        self._runner = engine.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        self._known: dict[str, Any] = {}
        self.num_drafts = 0

    def use(self, name: str, settings: SpeculationSettings) -> None:
        """Draft like this; what was learned when it was used before is remembered."""
        from ultrafuser.server.engine.worker.speculation import Speculation

        if name not in self._known:
            num_shared_ids = self._runner.speculation.num_shared_ids
            self._known[name] = Speculation(self._runner.runners, settings, num_shared_ids)
            self._count(self._known[name])
        self._runner.speculation = self._known[name]

    def _count(self, speculation: Any) -> None:
        """Count the drafts that are verified."""
        go_on = speculation.go_on

        def counting(ending: "Sequence[Row]", *others: Any) -> None:
            self.num_drafts += sum(row.is_draft for row in ending)
            go_on(ending, *others)

        speculation.go_on = counting


def measure(options: Options) -> list[Comparison]:
    """Comparisons with decoding one by one, and of single questions with one specialist."""
    # Imported here, so that `--help` and wrong options answer at once.
    from benchmarks.engines import fused_engine, plain_engine

    sizes = QUICK if options.quick else Sizes()
    fusion, info = options.load()
    # All stay to the end: vLLM would take the process's communication groups away with the first that ends.
    drafting = without = one_model = None
    if options.runs_fused:
        most = max(settings.max_tokens for settings in ways(fusion).values())
        drafting = fused_engine(fusion, SpeculationSettings(max_tokens=most))
    if options.runs_baseline:
        without, one_model = fused_engine(fusion), plain_engine(fusion, info)
    comparisons = []
    for case in sizes.cases:
        turns = list(_turns(case, ways(fusion), drafting, without, one_model))
        blocks = take_turns(turns, _questions(fusion, case, sizes))
        for name in (turn.name for turn in turns if turn.drafting is not None):
            is_chosen = name == "chosen"
            title = case.name if is_chosen else f"{case.name}, {name}"
            comparisons.append(compare_rates(title, blocks, name, case.bar if name in ways(fusion) else None))
        if case.batch == 1:
            comparisons.append(compare_times(f"{case.name}, against one specialist", blocks))
    return comparisons


@dataclass(frozen=True)
class Turn:
    """One way to answer."""

    name: str
    engine: "StepEngine"
    drafting: Drafting | None = None
    settings: SpeculationSettings = CHOSEN


def ways(fusion: FusionConfig) -> dict[str, SpeculationSettings]:
    """How tokens are guessed ahead in every case: as by default, and as the fusion file says, if it does."""
    own = fusion.engine.speculation
    return {"chosen": CHOSEN} | ({} if own is None or not own.max_tokens else {"as the file says": own})


def _turns(
    case: Case,
    ways_in_every_case: Mapping[str, SpeculationSettings],
    drafting: "StepEngine | None",
    without: "StepEngine | None",
    one_model: "StepEngine | None",
) -> Iterator[Turn]:
    if without is not None:
        yield Turn("without", without)
    if one_model is not None and case.batch == 1:
        yield Turn("one model", one_model)
    if drafting is not None:
        changing = Drafting(drafting)
        for name, settings in {**ways_in_every_case, **(ONLY | FIXED if case.is_fixed_too else {})}.items():
            yield Turn(name, drafting, changing, settings)


def take_turns(turns: Sequence[Turn], asked: Sequence[Sequence[Request]]) -> dict[str, list[Block]]:
    """Blocks by turn; the first batch of questions is a warm-up."""
    blocks: dict[str, list[Block]] = {turn.name: [] for turn in turns}
    for index, requests in enumerate(asked):
        for turn in turns if index % 2 else turns[::-1]:
            block = answer(turn, requests)
            if index:
                blocks[turn.name].append(block)
    return blocks


def answer(turn: Turn, requests: Sequence[Request]) -> Block:
    """Have requests answered to their ends."""
    engine = turn.engine
    if turn.drafting is not None:
        turn.drafting.use(turn.name, turn.settings)
    engine.forget_prefixes()
    engine.start(requests)
    engine.step()  # the drafts that it verifies were made before
    if turn.drafting is not None:
        turn.drafting.num_drafts = 0
    num_before = sum(map(len, engine.token_ids))
    num_rounds, start = 0, time.perf_counter()
    while not engine.is_idle:
        before = list(map(len, engine.token_ids))
        engine.step()
        num_rounds += sum(len(own) > count for own, count in zip(engine.token_ids, before, strict=True))
    seconds = time.perf_counter() - start
    num_tokens = sum(map(len, engine.token_ids)) - num_before
    return Block(engine.token_ids, num_tokens, num_rounds, turn.drafting.num_drafts if turn.drafting else 0, seconds)


def compare_rates(title: str, blocks: Mapping[str, Sequence[Block]], name: str, bar: Bar | None) -> Comparison:
    """Tokens a second with drafts and without."""
    with_drafts, without = blocks[name], blocks.get("without")
    rates = _rates(with_drafts)
    comparison = Comparison(
        case=title,
        unit="tokens per second",
        fused=Measured.of(rates),
        baseline=Measured.of(_rates(without)) if without else None,
        ratio=paired_ratio(rates, _rates(without)) if without else None,
        bar=bar,
        note=_drafts_in_words(with_drafts, without),
    )
    say(f"{title}: ratio {comparison.ratio}; {comparison.note}")
    return comparison


def _drafts_in_words(blocks: Sequence[Block], without: Sequence[Block] | None) -> str:
    num_tokens, num_rounds, num_drafts = (
        sum(values)
        for values in zip(*((own.num_tokens, own.num_rounds, own.num_drafts) for own in blocks), strict=True)
    )
    words = f"{num_tokens / num_rounds:.2f} tokens a round"
    if num_drafts:
        words += f", {(num_tokens - num_rounds) / num_drafts:.2f} of the drafts accepted"
    if without:
        answers, others = ([answer for block in own for answer in block.answers] for own in (blocks, without))
        num_equal = sum(own == other for own, other in zip(answers, others, strict=True))
        words += f", {num_equal} of {len(answers)} answers equal"
    return words


def compare_times(title: str, blocks: Mapping[str, Sequence[Block]]) -> Comparison:
    """Time a token with drafts, and of one specialist alone."""
    drafts, one = ([1000 / rate for rate in _rates(blocks.get(name, []))] for name in ("chosen", "one model"))
    comparison = Comparison(
        case=title,
        unit="ms per token",
        fused=Measured.of(drafts) if drafts else None,
        baseline=Measured.of(one) if one else None,
        ratio=paired_ratio(drafts, one) if drafts and one else None,
        bar=AGAINST_ONE_MODEL,
    )
    say(f"{title}: ratio {comparison.ratio}")
    return comparison


def _rates(blocks: Sequence[Block]) -> list[float]:
    return [block.num_tokens / block.seconds for block in blocks]


def _questions(fusion: FusionConfig, case: Case, sizes: Sizes) -> list[list[Request]]:
    """A batch of questions for the warm-up and for each block, from all domains in turn; other ones while there are."""
    domains = list(QUESTIONS.values()) if case.domain == "mixed" else [QUESTIONS[case.domain]]
    texts = [question for row in zip(*domains, strict=True) for question in row]
    asked = []
    for index in range(sizes.num_blocks + 1):
        chosen = [texts[(index * case.batch + place) % len(texts)] for place in range(case.batch)]
        prompts = render(fusion, [[{"role": "user", "content": text}] for text in chosen])
        asked.append([Request(own, sizes.num_tokens, True, case.temperature) for own in prompts])
    return asked


if __name__ == "__main__":
    run_benchmark(QUESTION, measure)
