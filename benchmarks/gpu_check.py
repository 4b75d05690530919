"""Does a GPU give what the CPU's tests promise? Exact tokens with CUDA graphs, and what guessing ahead gains there.

Run: python -m benchmarks.gpu_check [--quick] [--part rounds]

`--quick` runs the tiny model alone, on whatever the machine has: without a GPU it is the only thing to run.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal
from unittest.mock import patch

import torch

from benchmarks import speculation
from benchmarks.command import Options, run_benchmark, say
from benchmarks.measure import Bar, Comparison, Measured
from benchmarks.process import in_a_process_of_its_own
from benchmarks.result import Question
from benchmarks.workload import Prompts, Request, conversations, random_requests, render, tiny_fusion
from ultrafuser.gating.model.fusion import FusedModelInfo, FusionConfig
from ultrafuser.gating.model.schema import SpeculationSettings

QUESTION = Question(
    name="gpu_check",
    text="Is the fused engine exact on a GPU, with CUDA graphs, and what does guessing ahead gain there?",
    fused="fused engine",
    baseline="asked for",
    ratio="fused engine / asked for",
    method=(
        "Exactness: greedy tokens in float32 that equal the Transformers reference on the CPU, until a step at which "
        "the reference itself is undecided. Drafts: as in speculation, against decoding without, which keeps "
        "asynchronous scheduling and CUDA graphs. Each part runs in a process of its own. What steps cost: gpu_step."
    ),
)
ALL = Bar(limit=1.0, direction="at least")
MIN_GAP = 1e-3
"""Smallest distance of the reference's two best logits at which two float32 programs must agree."""

UTILIZATION = 0.5
"""Share of the memory that vLLM must find free at the start of an engine; what it takes is the fusion file's to say."""


class CheckOptions(Options):
    """What is checked."""

    part: Literal["tiny", "rounds", "demo", "drafts"] | None = None
    """Exactness of the tiny model, the same with drafts, or of the demo, or what drafts gain, alone."""


class OnGPU(CheckOptions):
    """Options whose fusion runs with compiled models and CUDA graphs, whatever its file says."""

    def load(self) -> tuple[FusionConfig, FusedModelInfo]:
        """As without a GPU, but for the engine."""
        fusion, info = super().load()
        return with_engine(fusion, enforce_eager=False, gpu_memory_utilization=UTILIZATION), info


def measure(options: CheckOptions) -> Iterator[Comparison]:
    """Exactness first; costs only where they mean something.

    Raises:
        SystemExit: there is no GPU, and `--quick` was not asked for.
    """
    has_gpu = torch.cuda.is_available()
    if not (has_gpu or options.quick):
        raise SystemExit("gpu_check: no GPU answers; --quick runs the part that needs none")
    os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")  # else Triton's float32 products are tf32, too coarse for this
    options = OnGPU(**dict(options)) if has_gpu else options
    if options.quick:
        yield from check_tiny(options) + check_tiny_with_drafts(options)
        return
    for name, part in PARTS.items():
        if options.part in (None, name):
            say(f"gpu_check: {part.__name__}")
            yield from in_a_process_of_its_own(part, options)


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
        for generation in reference.respond(prompts, max_new_tokens=num_tokens, use_cache=True)
    ]
    engine = fused_engine(fusion, speculation=drafts, max_num_seqs=len(prompts))
    with drafting_twice() as are_same:
        answers = engine.finish([Request(own, num_tokens) for own in prompts])
    num_equal = sum(map(count_equal, answers, expected))
    comparisons = [_of(f"{name}: equal tokens", "tokens", num_equal, sum(map(len, expected)))]
    if are_same:
        case = f"{name}: drafts as without graphs, of passes in whole graphs"
        comparisons.append(_of(case, "requests", sum(are_same), len(are_same)))
    if not fusion.engine.enforce_eager:
        graphs = compilation_counter.num_cudagraph_captured
        comparisons.append(_of(f"{name}: CUDA graphs", "graphs", graphs, len(fusion.specialists)))
    return comparisons


@contextmanager
def drafting_twice() -> Iterator[list[bool]]:
    """Collects, for each request and round that whole CUDA graphs draft, whether the drafts are those without any."""
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import BatchDescriptor

    from ultrafuser.server.engine.worker import drafting

    run_ahead, are_same = drafting.run_ahead, list[bool]()

    def twice(runner: Any, requests: Sequence[str], *others: Any) -> list[list[int]]:
        found = run_ahead(runner, requests, *others)
        if runner.single_tokens.find(len(requests))[0] == CUDAGraphMode.FULL:
            without = (CUDAGraphMode.NONE, BatchDescriptor(len(requests)))
            with patch.object(runner.single_tokens, "find", return_value=without):
                again = run_ahead(runner, requests, *others)
            are_same.extend(own == other for own, other in zip(found, again, strict=True))
        return found

    with patch.object(drafting, "run_ahead", twice):
        yield are_same


def measure_drafts(options: Options) -> list[Comparison]:
    """What guessing ahead gains, one question at a time and four mixed ones."""
    return [
        item.model_copy(update={"case": f"drafts, {item.case}"})
        for item in speculation.measure(options.model_copy(update={"quick": True}))
    ]


PARTS = {
    "tiny": check_tiny,
    "rounds": check_tiny_with_drafts,
    "demo": check_demo,
    "drafts": measure_drafts,
}


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


if __name__ == "__main__":
    run_benchmark(QUESTION, measure, CheckOptions)
