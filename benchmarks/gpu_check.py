"""Does a GPU give what the CPU's tests promise? Exact tokens with CUDA graphs, and what fusing costs there.

Run: python -m benchmarks.gpu_check [--quick]

`--quick` runs the tiny model alone, on whatever the machine has: without a GPU it is the only thing to run.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any
from unittest.mock import patch

import torch

from benchmarks import decode_step, speculation
from benchmarks.command import Options, run_benchmark, say
from benchmarks.measure import Bar, Comparison, Measured
from benchmarks.result import Question
from benchmarks.workload import Prompts, Request, conversations, random_requests, render, tiny_fusion
from ultrafuser.gating.model.fusion import FusedModelInfo, FusionConfig
from ultrafuser.gating.model.schema import SpeculationSettings

QUESTION = Question(
    name="gpu_check",
    text="Is the fused engine exact on a GPU, with CUDA graphs, and what does fusing cost there?",
    fused="fused engine",
    baseline="asked for",
    ratio="fused engine / asked for",
    method=(
        "Exactness: greedy tokens in float32 that equal the Transformers reference on the CPU, until a step at which "
        "the reference itself is undecided. Steps: as in decode_step. Fusing: time of gate and mixing, waited for, in "
        "a whole step. Drafts: as in speculation, against decoding without, which keeps asynchronous scheduling and "
        "CUDA graphs. Each part runs in a process of its own."
    ),
)
ALL = Bar(limit=1.0, direction="at least")
MIN_GAP = 1e-3
"""Smallest distance of the reference's two best logits at which two float32 programs must agree."""

UTILIZATION = 0.5
"""Share of the memory that vLLM must find free at the start of an engine; what it takes is the fusion file's to say."""


class OnGPU(Options):
    """Options whose fusion runs with compiled models and CUDA graphs, whatever its file says."""

    def load(self) -> tuple[FusionConfig, FusedModelInfo]:
        """As without a GPU, but for the engine."""
        fusion, info = super().load()
        return with_engine(fusion, enforce_eager=False, gpu_memory_utilization=UTILIZATION), info


def measure(options: Options) -> list[Comparison]:
    """Exactness first; costs only where they mean something.

    Raises:
        SystemExit: there is no GPU, and `--quick` was not asked for.
    """
    has_gpu = torch.cuda.is_available()
    if not (has_gpu or options.quick):
        raise SystemExit("gpu_check: no GPU answers; --quick runs the part that needs none")
    options = OnGPU(**dict(options)) if has_gpu else options
    if options.quick:
        return check_tiny(options) + check_tiny_with_drafts(options)
    comparisons: list[Comparison] = []
    for part in (check_tiny, check_tiny_with_drafts, check_demo, measure_steps, measure_fusing, measure_drafts):
        say(f"gpu_check: {part.__name__}")
        comparisons += _in_a_process_of_its_own(part, options)
    return comparisons


def check_tiny(options: Options) -> list[Comparison]:
    """Three random specialists of different depth, on random prompts of different lengths."""
    return _check_tiny("tiny", options, None)


def check_tiny_with_drafts(options: Options) -> list[Comparison]:
    """The same with drafts in every step."""
    return _check_tiny("tiny with drafts", options, SpeculationSettings(min_tokens=4, max_tokens=4))


def _check_tiny(name: str, options: Options, drafts: SpeculationSettings | None) -> list[Comparison]:
    with tiny_fusion() as path:
        fusion, info = options.model_copy(update={"fusion": path}).load()
        lengths = [(13, 16, 36), (100, 20, 7), (1, 1, 60), (50, 50, 50)]
        requests = random_requests(info, [100] * len(lengths), [0] * len(lengths), seed=0)
        prompts = [
            [ids[:length] for ids, length in zip(request.prompts, own, strict=True)]
            for request, own in zip(requests, lengths, strict=True)
        ]
        return exactness(name, fusion, prompts, num_tokens=20, drafts=drafts)


def check_demo(options: Options) -> list[Comparison]:
    """The options' fusion in float32, on conversations."""
    fusion, _ = options.load()
    specialists = tuple(item.model_copy(update={"dtype": "float32"}) for item in fusion.specialists)
    fusion = with_engine(fusion, dtype="float32").model_copy(update={"specialists": specialists})
    return exactness(fusion.name, fusion, render(fusion, conversations(8)), num_tokens=24)


def exactness(
    name: str,
    fusion: FusionConfig,
    prompts: Sequence[Prompts],
    num_tokens: int,
    drafts: SpeculationSettings | None = None,
) -> list[Comparison]:
    """Tokens that equal the reference's, of those that are decided; and captured graphs, if there are to be any."""
    from vllm.compilation.counter import compilation_counter

    from benchmarks.engines import fused_engine
    from ultrafuser.gating.model.reference import UltraFuserForCausalLM

    reference = UltraFuserForCausalLM.from_fusion(fusion)
    expected = [
        list(generation.token_ids)[: num_decided(generation.top2_gap.tolist())]
        for generation in reference.generate(prompts, max_new_tokens=num_tokens, use_cache=True)
    ]
    engine = fused_engine(fusion, speculation=drafts)
    answers = engine.finish([Request(own, num_tokens) for own in prompts])
    num_equal = sum(map(count_equal, answers, expected))
    comparisons = [_of(f"{name}: equal tokens", "tokens", num_equal, sum(map(len, expected)))]
    if not fusion.engine.enforce_eager:
        graphs = compilation_counter.num_cudagraph_captured
        comparisons.append(_of(f"{name}: CUDA graphs", "graphs", graphs, len(fusion.specialists)))
    return comparisons


def measure_steps(options: Options) -> list[Comparison]:
    """The fused step against n single ones."""
    return [
        item.model_copy(update={"case": f"step, {item.case}, against {decode_step.QUESTION.baseline}"})
        for item in decode_step.measure(options)
    ]


def measure_fusing(options: Options) -> list[Comparison]:
    """Gate and mixing as a share of the fused step."""
    from benchmarks.engines import fused_engine
    from benchmarks.stepping import alternate

    fusion, info = options.load()
    engine, sizes, comparisons = fused_engine(fusion), decode_step.Sizes(), []
    for batch in sizes.batches:
        num_tokens = 3 * (sizes.num_steps + 1) + sizes.prompt_length
        requests = random_requests(info, [sizes.prompt_length] * batch, [num_tokens] * batch, seed=batch)
        alternate(engine, None, requests, 1, sizes.num_steps)  # warm-up
        with timed_mixing() as seconds:
            (round_,) = alternate(engine, None, requests, 1, sizes.num_steps)
        mixing = Measured.of(seconds[-sizes.num_steps :], scale=1000)
        step = Measured.of(round_.fused, scale=1000)
        case = f"gate and mixing of a step, batch {batch}"
        ratio = mixing.value / step.value
        comparisons.append(Comparison(case=case, unit="ms", fused=mixing, baseline=step, ratio=ratio))
    return comparisons


def measure_drafts(options: Options) -> list[Comparison]:
    """What guessing ahead gains, one question at a time and four mixed ones."""
    return [
        item.model_copy(update={"case": f"drafts, {item.case}"})
        for item in speculation.measure(options.model_copy(update={"quick": True}))
    ]


@contextmanager
def timed_mixing() -> Iterator[list[float]]:
    """Collects the seconds that each step's gate and mixing take, from an idle device to an idle device."""
    from ultrafuser.server.engine.worker.mixing import Mixer

    seconds: list[float] = []
    fuse = Mixer.fuse_into_leader

    def timed(*args: Any, **kwargs: Any) -> Any:
        _wait()
        start = time.perf_counter()
        fused = fuse(*args, **kwargs)
        _wait()
        seconds.append(time.perf_counter() - start)
        return fused

    with patch.object(Mixer, "fuse_into_leader", timed):
        yield seconds


def with_engine(fusion: FusionConfig, **settings: Any) -> FusionConfig:
    """The fusion with other engine settings."""
    return fusion.model_copy(update={"engine": fusion.engine.model_copy(update=settings)})


def num_decided(gaps: Sequence[float]) -> int:
    """Steps before the first at which the two best logits are too close to tell."""
    decided = [gap > MIN_GAP for gap in gaps]
    return decided.index(False) if False in decided else len(decided)


def count_equal(answer: Sequence[int], expected: Sequence[int]) -> int:
    """Tokens before the first that differs."""
    pairs = enumerate(zip(answer, expected, strict=False))
    return next((index for index, (own, other) in pairs if own != other), min(len(answer), len(expected)))


def _of(case: str, unit: str, value: float, asked: float) -> Comparison:
    fused, baseline = Measured(value=value), Measured(value=asked)
    return Comparison(case=case, unit=unit, fused=fused, baseline=baseline, ratio=value / asked, bar=ALL)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _in_a_process_of_its_own(part: Callable[[Options], list[Comparison]], options: Options) -> list[Comparison]:
    """A GPU's memory is free again only when a process ends."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(part, options).result()


if __name__ == "__main__":
    run_benchmark(QUESTION, measure)
