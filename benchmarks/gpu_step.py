"""What a fused step costs on a GPU: against n steps of one specialist, against the time its bytes need, part by part.

Run: python -m benchmarks.gpu_step [--quick] [--shape Qwen2.5-7B]

Models of real shapes with random weights; `--quick` runs a tiny one on whatever the machine has. A profile of single
steps (torch's profiler) is written beside the result.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal
from unittest.mock import patch

import torch

from benchmarks import decode_step
from benchmarks.command import Options, run_benchmark, say
from benchmarks.device import copy_bandwidth, memory_in_use, total_memory, wait, write_profile
from benchmarks.measure import Bar, Comparison, Measured
from benchmarks.process import in_a_process_of_its_own
from benchmarks.result import Question
from benchmarks.shapes import NAMES, fusion_of_shape
from benchmarks.stepping import NUM_UNCOUNTED, Round, alternate
from benchmarks.workload import Request, random_requests
from ultrafuser.gating.model.schema import SpeculationSettings

if TYPE_CHECKING:
    from benchmarks.engines import StepEngine

QUESTION = Question(
    name="gpu_step",
    text="What does a fused step cost on a GPU, part by part, and how far is it from what the memory allows?",
    fused="fused engine",
    baseline="what the case names",
    ratio="fused engine / what the case names",
    method=(
        "Models of published shapes with random weights, compiled and in CUDA graphs, bfloat16. Fused and single steps "
        "take turns in one process. Floor: bytes of all weights (but for embedding tables, of which a step reads rows) "
        "and of the KV cache, over the bytes a second that a large copy on the card reads and writes, measured first. "
        "Parts: by events in the device's stream. Rounds: 4 drafts of the leading specialist, all verified; the random "
        "weights of models of one shape are the same, so that what they agree on means nothing."
    ),
)
NUM_SPECIALISTS = len(NAMES)
LONG = 0
"""Among requests by batch: the one with the long prompt."""

COST_OF_FUSING = Bar(limit=1.05, direction="at most")
SHARE_OF_MIXING = Bar(limit=0.03, direction="at most")
ABOVE_THE_FLOOR = Bar(limit=1.3, direction="at most")
WITHIN_RESERVED = Bar(limit=1.0, direction="at most")

ROUNDS = {
    "none drafted": SpeculationSettings(drafter="ngram", max_tokens=0),
    "round of 4 drafts": SpeculationSettings(drafter="leading", min_tokens=4, max_tokens=4),
}
"""What the engine with drafts does; the first one shows what giving up asynchronous scheduling costs."""


class StepOptions(Options):
    """What is measured."""

    shape: str | None = None
    """One of the shapes alone."""

    part: Literal["steps", "rounds"] | None = None
    """Steps without drafts alone, or rounds with them."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured, and how much of the memory each engine takes."""

    shape: str
    fused_share: float = 0.7
    plain_share: float = 0.25
    batches: tuple[int, ...] = (1, 8, 32, 128)
    prompt_length: int = 64
    long_prompt: int = 2000
    num_rounds: int = 8
    num_steps: int = 12
    has_bars: bool = False
    """Whether the share of mixing and the distance to the floor are judged: where the weights fill the step."""


SIZES = (Sizes("SmolLM2-135M", 0.3, 0.2), Sizes("Qwen2.5-7B", has_bars=True))
QUICK = Sizes("tiny", batches=(1, 2), prompt_length=16, long_prompt=40, num_rounds=2, num_steps=2)


def measure(options: StepOptions) -> Iterator[Comparison]:
    """Every shape, without drafts and with, each in a process of its own.

    Raises:
        SystemExit: there is no GPU, and `--quick` was not asked for.
    """
    if not (torch.cuda.is_available() or options.quick):
        raise SystemExit("gpu_step: no GPU answers; --quick runs a tiny model that needs none")
    for sizes in (QUICK,) if options.quick else SIZES:
        if options.shape in (None, sizes.shape):
            for name, part in PARTS.items():
                if options.part in (None, name):
                    say(f"gpu_step: {sizes.shape}, {name}")
                    yield from in_a_process_of_its_own(part, sizes, options)


def measure_steps(sizes: Sizes, options: StepOptions) -> Iterator[Comparison]:
    """Single steps, a long prompt and memory, of an engine that drafts nothing."""
    bandwidth = copy_bandwidth()
    say(f"gpu_step: a large copy moves {bandwidth / 1e12:.2f} TB/s, read and written")
    torch.cuda.empty_cache()
    before, largest = memory_in_use(), max(sizes.batches)
    with two_engines(sizes, None) as (fused, start_plain, requests):
        num_graphs = num_captured()
        yield _memory(sizes.shape, fused, requests[largest], sizes.fused_share, before, num_graphs)
        before, plain = memory_in_use(), start_plain()
        name, num_graphs = f"{sizes.shape}, one specialist alone", num_captured() - num_graphs
        yield _memory(name, plain, requests[largest], sizes.plain_share, before, num_graphs)
        for batch in sizes.batches:
            yield from _steps(sizes, batch, fused, plain, requests[batch], bandwidth)
        yield _first_token(sizes, fused, plain, requests[LONG])
        if options.folder is not None:
            write_profile(fused, requests[1], options.folder / f"{QUESTION.name}-{sizes.shape}.txt")


def measure_rounds(sizes: Sizes, _options: StepOptions) -> Iterator[Comparison]:
    """Steps of an engine that can draft, while it does not and while it always does.

    Small batches first, since the clock may cut it off. Not at the largest batch, and half as often: with drafts a
    batch has more graphs to capture, and a round takes as long as several steps.
    """
    from benchmarks.speculation import Drafting

    sizes = replace(sizes, batches=sizes.batches[:-1], num_rounds=sizes.num_rounds // 2)
    with two_engines(sizes, SpeculationSettings(max_tokens=4)) as (fused, start_plain, requests):
        plain, drafting = start_plain(), Drafting(fused)
        for batch in sizes.batches:
            for name, settings in ROUNDS.items():
                drafting.use(name, settings)
                case = f"{sizes.shape}: {name}, batch {batch}"
                yield from _rounds(case, sizes, fused, plain, requests[batch], settings.max_tokens)


def _rounds(
    case: str,
    sizes: Sizes,
    fused: "StepEngine",
    plain: "StepEngine",
    requests: Sequence[Request],
    num_drafts: int,
) -> Iterator[Comparison]:
    """Rounds against single steps, and where their time goes: drafting, and verification with gate and mixing."""
    with timed_parts() as parts:
        rounds = _alternate(sizes, fused, plain, requests)
    against_single = decode_step.compare(len(requests), rounds, NUM_SPECIALISTS)
    against = f"{case}, against {NUM_SPECIALISTS} single steps"
    yield _told(against_single.model_copy(update={"case": against, "bar": None}))
    step = Measured.of([seconds for own in rounds for seconds in own.fused], scale=1000)
    passes = [sum(own) for own in zip(*[iter(parts["decode"])] * NUM_SPECIALISTS, strict=False)]
    verifying = [sum(own) for own in zip(passes, parts["gate"], parts["mix"], strict=False)]
    graphs = graphs_of(fused, len(requests), num_drafts)
    for name, seconds in {"drafting": parts.get("draft", []), "verification": verifying}.items():
        if seconds:
            yield _ratio(f"{case}: {name}, of the step", Measured.of(seconds, scale=1000), step, note=graphs[name])


def graphs_of(engine: "StepEngine", num_requests: int, num_drafts: int) -> dict[str, str]:
    """From which CUDA graphs the leader's passes of a round are replayed, if every request has so many drafts."""
    leader = runners_of(engine)[0]
    single = leader.single_tokens.find(num_requests)
    rounds = leader.cudagraph_dispatcher.dispatch(num_requests * (1 + num_drafts), uniform_decode=True)
    told = {"drafting": single, "verification": rounds if num_drafts else single}
    return {name: f"graphs: {mode.name}, {graph.num_tokens} rows" for name, (mode, graph) in told.items()}


PARTS = {"steps": measure_steps, "rounds": measure_rounds}


@contextmanager
def two_engines(
    sizes: Sizes, speculation: SpeculationSettings | None
) -> Iterator[tuple["StepEngine", Callable[[], "StepEngine"], Mapping[int, list[Request]]]]:
    """The fused engine, what starts the plain one beside it, and requests by batch (`LONG`: one long prompt)."""
    from benchmarks.engines import fused_engine, plain_engine

    has_gpu = torch.cuda.is_available()
    settings = {
        "enforce_eager": not has_gpu,
        "max_model_len": 4 * sizes.prompt_length + sizes.long_prompt,
        "max_num_seqs": max(sizes.batches),
        "max_num_batched_tokens": 4096,
    }
    if not has_gpu:
        settings |= {"kv_cache_memory_bytes": 2**26, "max_step_seconds": 0}
    with fusion_of_shape(sizes.shape, settings) as path:
        fusion, info = Options(fusion=path).load()
        num_tokens = most_tokens(sizes)
        requests = {
            batch: random_requests(info, [sizes.prompt_length] * batch, [num_tokens] * batch, seed=batch)
            for batch in sizes.batches
        } | {LONG: random_requests(info, [sizes.long_prompt], [1], seed=0)}
        drafts: dict[str, Any] = {"speculation": speculation} if speculation else {}
        fused = fused_engine(fusion, gpu_memory_utilization=sizes.fused_share, **drafts)
        share = fusion.engine.model_copy(update={"gpu_memory_utilization": sizes.plain_share})
        yield fused, lambda: plain_engine(fusion.model_copy(update={"engine": share}), info), requests


def most_tokens(sizes: Sizes) -> int:
    """Of a response that lasts for all steps, if every draft of them holds."""
    num_steps = sizes.num_rounds * (NUM_UNCOUNTED + sizes.num_steps)
    return 2 + num_steps * (1 + max(own.max_tokens for own in ROUNDS.values()))


def num_bytes_of_step(runners: Sequence[Any], num_cached_tokens: int) -> int:
    """What a decode step must read: weights but for rows of an embedding table that is nothing else, and the cache."""
    num_bytes = 0
    for runner in runners:
        is_tied = runner.model_config.hf_config.tie_word_embeddings
        weights = [own for name, own in runner.model.named_parameters() if is_tied or "embed_tokens" not in name]
        num_bytes += sum(own.numel() * own.element_size() for own in weights)
        caches = runner.get_kv_cache_spec().values()
        num_bytes += num_cached_tokens * sum(own.page_size_bytes // own.block_size for own in caches)
    return num_bytes


@contextmanager
def timed_parts() -> Iterator[dict[str, list[float]]]:
    """Collects the seconds of each step's parts by their names, as the engine itself measures them; and "draft"."""
    from ultrafuser.server.engine.worker.drafting import Drafts, Errand
    from ultrafuser.server.engine.worker.timing import StepClock

    seconds: dict[str, list[float]] = {}
    take, run = StepClock.take, Errand.run

    def collecting(clock: StepClock) -> Any:
        spans = take(clock)
        for span in spans:
            seconds.setdefault(span.part, []).append(span.seconds)
        return spans

    def drafting(errand: Errand, runner: Any, num_shared_ids: int) -> Drafts:
        clock = StepClock(runner.device)
        with clock.measure("draft"):
            drafts = run(errand, runner, num_shared_ids)
        wait()
        clock.take()
        return drafts

    with patch.object(StepClock, "take", collecting), patch.object(Errand, "run", drafting):
        yield seconds


def _alternate(sizes: Sizes, fused: "StepEngine", plain: "StepEngine", requests: Sequence[Request]) -> list[Round]:
    alternate(fused, plain, requests, 1, sizes.num_steps)  # warm-up
    return alternate(fused, plain, requests, sizes.num_rounds, sizes.num_steps)


def _steps(
    sizes: Sizes,
    batch: int,
    fused: "StepEngine",
    plain: "StepEngine",
    requests: Sequence[Request],
    bandwidth: float,
) -> list[Comparison]:
    """A step against single ones, gate and mixing as a share of it, and both engines against their floors."""
    with timed_parts() as parts:
        rounds = _alternate(sizes, fused, plain, requests)
    name = sizes.shape
    against_single = decode_step.compare(batch, rounds, NUM_SPECIALISTS)
    step = Measured.of([seconds for own in rounds for seconds in own.fused], scale=1000)
    single = Measured.of([seconds for own in rounds for seconds in own.baseline], scale=1000)
    mixing = Measured.of([sum(own) for own in zip(parts["gate"], parts["mix"], strict=False)], scale=1000)
    num_cached = batch * (sizes.prompt_length + sizes.num_rounds * (sizes.num_steps + 1) // 2)
    runners = runners_of(fused)
    floors = [1000 * num_bytes_of_step(own, num_cached) / bandwidth for own in (runners, runners[:1])]
    return [
        _told(
            against_single.model_copy(update={"case": f"{name}: step, batch {batch}, against {NUM_SPECIALISTS} single"})
        ),
        _ratio(
            f"{name}: gate, mixing and marks, batch {batch}, of the step",
            mixing,
            step,
            SHARE_OF_MIXING if sizes.has_bars else None,
            note=f"gate {1000 * statistics.median(parts['gate']):.3f} ms",
        ),
        _ratio(
            f"{name}: step, batch {batch}, against its floor",
            step,
            Measured(value=floors[0]),
            ABOVE_THE_FLOOR if sizes.has_bars and batch == 1 else None,
        ),
        _ratio(f"{name}: one specialist's step, batch {batch}, against its floor", single, Measured(value=floors[1])),
    ]


def _first_token(sizes: Sizes, fused: "StepEngine", plain: "StepEngine", requests: Sequence[Request]) -> Comparison:
    """Time to the first token of a long prompt, against n prompts of one specialist."""
    seconds: dict[str, list[float]] = {"fused": [], "plain": []}
    for _ in range(sizes.num_rounds + 1):
        for side, engine in (("fused", fused), ("plain", plain)):
            engine.forget_prefixes()
            wait()
            start = time.perf_counter()
            engine.start(requests)
            seconds[side].append(time.perf_counter() - start)
            engine.stop()
    ours, theirs = (
        Measured.of(own[1:], scale=1000 * times)
        for own, times in ((seconds["fused"], 1), (seconds["plain"], NUM_SPECIALISTS))
    )
    case = f"{sizes.shape}: first token of {sizes.long_prompt}, against {NUM_SPECIALISTS} single"
    return _ratio(case, ours, theirs, COST_OF_FUSING)


def _memory(
    name: str, engine: "StepEngine", requests: Sequence[Request], share: float, before: float, num_graphs: int
) -> Comparison:
    """What the engine has taken of the device's memory after the largest batch, against what it was allowed."""
    engine.start(requests)
    for _ in range(5):
        engine.step()
    engine.stop()
    used, allowed = memory_in_use() - before, share * total_memory()
    return _told(
        Comparison(
            case=f"{name}: memory after batch {len(requests)}, of what the engine may take",
            unit="GiB",
            fused=Measured(value=used / 2**30),
            baseline=Measured(value=allowed / 2**30),
            ratio=used / allowed if allowed else None,
            bar=WITHIN_RESERVED if allowed else None,
            note=_how_it_runs(engine, num_graphs),
        )
    )


def runners_of(engine: "StepEngine") -> list[Any]:
    """The specialists' model runners."""
    core = engine.llm.llm_engine.engine_core.engine_core
    return list(core.model_executor.driver_worker.worker.model_runner.runners)


def _how_it_runs(engine: "StepEngine", num_graphs: int) -> str:
    core = engine.llm.llm_engine.engine_core.engine_core
    is_async = core.vllm_config.scheduler_config.async_scheduling
    num_blocks = core.scheduler.kv_cache_manager.block_pool.num_gpu_blocks
    return f"asynchronous scheduling: {'on' if is_async else 'off'}, {num_graphs} CUDA graphs, {num_blocks} KV blocks"


def num_captured() -> int:
    """CUDA graphs that this process has captured."""
    from vllm.compilation.counter import compilation_counter

    return compilation_counter.num_cudagraph_captured


def _ratio(case: str, ours: Measured, theirs: Measured, bar: Bar | None = None, note: str | None = None) -> Comparison:
    ratio = ours.value / theirs.value
    return _told(Comparison(case=case, unit="ms", fused=ours, baseline=theirs, ratio=ratio, bar=bar, note=note))


def _told(comparison: Comparison) -> Comparison:
    """The comparison, which is said at once: what comes later may fail."""
    fused, baseline, ratio = (
        "-" if value is None else f"{value:#.4g}"
        for value in (
            comparison.fused and comparison.fused.value,
            comparison.baseline and comparison.baseline.value,
            comparison.ratio,
        )
    )
    say(f"{comparison.case}: {fused} against {baseline} {comparison.unit}, ratio {ratio} {comparison.note or ''}")
    return comparison


if __name__ == "__main__":
    run_benchmark(QUESTION, measure, StepOptions)
