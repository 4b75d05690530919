"""What guessing ahead gains: tokens a second with drafts, against decoding one by one.

What a fusion file says itself (`--fusion trained/head`) is measured beside what is chosen by default.

Run: python -m benchmarks.speculation [--quick]
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.command import Options, run_benchmark, say
from benchmarks.measure import Bar, Comparison, Measured, paired_ratio
from benchmarks.result import Question
from benchmarks.stepping import race
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
        "Engines live in one process and answer the same questions step by step in turns: the one with fewer tokens "
        "goes on, to the answers' ends or to the most tokens. Prompts are read before the clock runs; drafts that are "
        "made meanwhile count. "
        "One engine has drafts, whose drafter and number change between races; unnamed ones are chosen step by step, "
        "as by default. The ratio is the median over races."
    ),
)
GAIN_OF_ONE = Bar(limit=1.5, direction="at least")
GAIN_OF_MIXED = Bar(limit=1.1, direction="at least")
NO_LOSS = Bar(limit=0.98, direction="at least")
AGAINST_ONE_MODEL = Bar(limit=2.0, direction="at most")

CHOSEN = SpeculationSettings()
NONE = SpeculationSettings(drafter="ngram", max_tokens=0)
OTHERS = {
    "leading alone": SpeculationSettings(drafter="leading"),
    "ngram alone": SpeculationSettings(drafter="ngram"),
    "leading, always 4": SpeculationSettings(drafter="leading", min_tokens=4, max_tokens=4),
    "ngram, always 4": SpeculationSettings(drafter="ngram", min_tokens=4, max_tokens=4),
}
NEVER = {"never": NONE}
"""The engine with drafts while it makes none: how far two engines of one process, and what drafts need, are apart."""

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
    others: Mapping[str, SpeculationSettings] = field(default_factory=dict)
    """What is measured beside the chosen drafts."""

    bar: Bar = NO_LOSS

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.domain}, {self.batch} at a time" + (f", temperature {self.temperature}" * bool(self.temperature))


CASES = (
    *(Case(domain, 1, others=OTHERS if domain == "text" else {}, bar=GAIN_OF_ONE) for domain in QUESTIONS),
    Case("text", 1, temperature=0.7),
    *(Case(domain, batch) for domain in QUESTIONS for batch in (4, 16)),
    Case("mixed", 4, others={"leading alone": OTHERS["leading alone"]}, bar=GAIN_OF_MIXED),
    Case("mixed", 4, temperature=0.7),
    Case("mixed", 16),
    Case("mixed", 32, others=NEVER),
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
    num_rounds: int
    """Steps in which a request was given tokens, summed over requests."""

    num_drafts: int
    seconds: float

    @property
    def num_tokens(self) -> int:
        """Those that came while the clock ran: all but the first of each answer."""
        return sum(len(answer) - 1 for answer in self.answers)


class Drafting:
    """The engine with drafts, whose drafter can be changed while it is idle, and counted."""

    def __init__(self, engine: "StepEngine") -> None:
        self.engine = engine
        self._runner = engine.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        self._known: dict[str, Any] = {}
        self.num_drafts = 0
        self.seconds = 0.0
        """Between the last two steps: learning, choosing and drafting."""

    def use(self, name: str, settings: SpeculationSettings) -> None:
        """Draft like this; what was learned when it was used before is remembered."""
        from ultrafuser.server.engine.worker.drafting import LeadingDrafter
        from ultrafuser.server.engine.worker.speculation import Speculation

        if name not in self._known:
            runners, num_shared_ids = self._runner.runners, self._runner.speculation.num_shared_ids
            leading = partial(LeadingDrafter, runners, num_shared_ids)
            self._known[name] = Speculation(runners[0], settings, len(runners), num_shared_ids, leading)
            self._count(self._known[name])
        self._runner.speculation = self._known[name]

    def _count(self, speculation: Any) -> None:
        """Count the drafts that are verified, and time what is done between steps."""
        go_on = speculation.go_on

        def counting(ending: "Sequence[Row]", *others: Any) -> None:
            self.num_drafts += sum(row.is_draft for row in ending)
            start = time.perf_counter()
            go_on(ending, *others)
            self.seconds = time.perf_counter() - start

        speculation.go_on = counting


class Answering:
    """One batch of answers on the way, as a job of a race: each has its first token."""

    def __init__(self, engine: "StepEngine", requests: Sequence[Request]) -> None:
        self._engine = engine
        self._most = sum(request.num_tokens for request in requests)
        self.num_rounds = 0
        engine.forget_prefixes()
        engine.start(requests)
        assert sum(map(len, self.answers)) == len(requests), "prompts that are read in turn give unequal starts"

    @property
    def answers(self) -> list[list[int]]:
        """As far as they are."""
        return self._engine.token_ids

    @property
    def progress(self) -> float:
        """Share of the most tokens that there can be; 1 at the end."""
        return 1.0 if self._engine.is_idle else sum(map(len, self.answers)) / (self._most + 1)

    def step(self) -> None:
        """One step of the engine."""
        before = list(map(len, self.answers))
        self._engine.step()
        self.num_rounds += sum(len(own) > count for own, count in zip(self.answers, before, strict=True))


def measure(options: Options) -> list[Comparison]:
    """Comparisons with decoding one by one, and of single questions with one specialist."""
    # Imported here, so that `--help` and wrong options answer at once.
    from benchmarks.engines import fused_engine, plain_engine

    sizes = QUICK if options.quick else Sizes()
    fusion, info = options.load()
    # All stay to the end: vLLM would take the process's communication groups away with the first that ends.
    drafting, rivals = None, {}
    if options.runs_fused:
        most = max(settings.max_tokens for settings in ways(fusion).values())
        engine = fused_engine(fusion, speculation=SpeculationSettings(max_tokens=most), max_step_seconds=0)
        drafting = Drafting(engine)
    if options.runs_baseline:
        rivals = {"without": fused_engine(fusion, max_step_seconds=0), "one model": plain_engine(fusion, info)}
    comparisons = []
    for case in sizes.cases:
        asked = _questions(fusion, case, sizes)
        races = {}
        for name, settings in {**ways(fusion), **case.others}.items():
            is_against_one = case.batch == 1 and name == "chosen"
            if drafting is None and not is_against_one:
                continue
            own_rivals = {side: engine for side, engine in rivals.items() if side == "without" or is_against_one}
            blocks = [race_once(drafting, name, settings, own_rivals, requests) for requests in asked]
            races[name] = blocks[1:]  # the first is a warm-up
            if drafting is not None:
                title = case.name if name == "chosen" else f"{case.name}, {name}"
                comparisons.append(compare_rates(title, races[name], case.bar if name in ways(fusion) else None))
        if case.batch == 1:
            comparisons.append(compare_times(f"{case.name}, against one specialist", races["chosen"]))
    return comparisons


def race_once(
    drafting: Drafting | None,
    name: str,
    settings: SpeculationSettings,
    rivals: Mapping[str, "StepEngine"],
    requests: Sequence[Request],
) -> dict[str, Block]:
    """The same answers with drafts and without, step by step in turns; by side: "drafts", and those of the rivals."""
    jobs, seconds_before = {}, {}
    if drafting is not None:
        drafting.use(name, settings)
        jobs["drafts"] = Answering(drafting.engine, requests)
        # The second tokens' drafts, which are made in the step that reads the prompts.
        seconds_before["drafts"], drafting.num_drafts = drafting.seconds, 0
    jobs |= {side: Answering(engine, requests) for side, engine in rivals.items()}
    seconds = race(list(jobs.values()), num_steps=1)
    num_drafts = {"drafts": drafting.num_drafts} if drafting is not None else {}
    return {
        side: Block(job.answers, job.num_rounds, num_drafts.get(side, 0), took + seconds_before.get(side, 0.0))
        for (side, job), took in zip(jobs.items(), seconds, strict=True)
    }


def ways(fusion: FusionConfig) -> dict[str, SpeculationSettings]:
    """How tokens are guessed ahead in every case: as by default, and as the fusion file says, if it does."""
    own = fusion.engine.speculation
    return {"chosen": CHOSEN} | ({} if own is None or not own.max_tokens else {"as the file says": own})


def compare_rates(title: str, races: Sequence[Mapping[str, Block]], bar: Bar | None) -> Comparison:
    """Tokens a second with drafts and without."""
    rates, baseline = _rates(races, "drafts"), _rates(races, "without")
    comparison = Comparison(
        case=title,
        unit="tokens per second",
        fused=Measured.of(rates),
        baseline=Measured.of(baseline) if baseline else None,
        ratio=paired_ratio(rates, baseline) if baseline else None,
        bar=bar,
        note=_drafts_in_words(races),
    )
    say(f"{title}: ratio {comparison.ratio}; {comparison.note}")
    return comparison


def _drafts_in_words(races: Sequence[Mapping[str, Block]]) -> str:
    blocks = [own["drafts"] for own in races]
    num_tokens, num_rounds, num_drafts = (
        sum(values)
        for values in zip(*((own.num_tokens, own.num_rounds, own.num_drafts) for own in blocks), strict=True)
    )
    words = f"{num_tokens / num_rounds:.2f} tokens a round"
    if num_drafts:
        words += f", {(num_tokens - num_rounds) / num_drafts:.2f} of the drafts accepted"
    pairs = [
        pair
        for own in races
        if "without" in own
        for pair in zip(own["drafts"].answers, own["without"].answers, strict=True)
    ]
    if pairs:
        words += f", {sum(own == other for own, other in pairs)} of {len(pairs)} answers equal"
    return words


def compare_times(title: str, races: Sequence[Mapping[str, Block]]) -> Comparison:
    """Time a token with drafts, and of one specialist alone."""
    drafts, one = ([1000 / rate for rate in _rates(races, side)] for side in ("drafts", "one model"))
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


def _rates(races: Sequence[Mapping[str, Block]], side: str) -> list[float]:
    return [own[side].num_tokens / own[side].seconds for own in races if side in own]


def _questions(fusion: FusionConfig, case: Case, sizes: Sizes) -> list[list[Request]]:
    """A batch of questions for the warm-up and for each block, from all domains in turn; other ones while there are."""
    domains = list(QUESTIONS.values()) if case.domain == "mixed" else [QUESTIONS[case.domain]]
    texts = [question for row in zip(*domains, strict=True) for question in row]
    asked = []
    for index in range(sizes.num_blocks + 1):
        chosen = [texts[(index * case.batch + place) % len(texts)] for place in range(case.batch)]
        prompts = render(fusion, [[{"role": "user", "content": text}] for text in chosen])
        asked.append(
            [
                Request(own, sizes.num_tokens, True, case.temperature, seed=index * case.batch + place)
                for place, own in enumerate(prompts)
            ]
        )
    return asked


if __name__ == "__main__":
    run_benchmark(QUESTION, measure)
