"""An in-process fused engine whose inside can be looked at, and requests that arrive when a test says."""

import gc
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self
from unittest import mock

from vllm import RequestOutput, SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.llm_engine import LLMEngine

from tests.server.engine.async_cpu import AsyncOnCPUEngineArgs
from ultrafuser.gating.model.fusion import inspect_fusion, load_fusion
from ultrafuser.server.engine.client.input_processor import FusedInputProcessor
from ultrafuser.server.engine.client.mark_stream import Takeover
from ultrafuser.server.engine.client.step_feed import StepFeed
from ultrafuser.server.engine.shared.extra_args import fused_input
from ultrafuser.server.engine.shared.options import engine_arguments
from ultrafuser.server.engine.shared.report import StepReport
from ultrafuser.server.engine.worker.drafting import Drafter
from ultrafuser.server.engine.worker.fused_step import FusedModelRunner
from ultrafuser.server.engine.worker.lookahead import Ahead

Prompts = list[list[int]]
"""A request's own prompts, one per specialist."""


@dataclass
class Arrival:
    """A request and the engine step before which it arrives."""

    prompts: Prompts
    params: SamplingParams
    step: int = 0
    abort_after: int | None = None
    """Engine steps after arrival at which the client leaves."""
    cache_salt: str | None = None
    """Separates this request's cached blocks from those of other salts."""


class Noisy:
    """Guesses of another drafter, some cut short or spoilt."""

    def __init__(self, own: Drafter) -> None:
        self._own, self._random = own, random.Random(1)

    def propose(self, plan: Mapping[str, Ahead]) -> dict[str, list[int]]:
        """Sometimes what the other guesses."""
        found = self._own.propose(plan)
        for token_ids in found.values():
            del token_ids[self._random.randrange(5) :]
            for index in range(len(token_ids)):
                if self._random.random() < 0.2:
                    token_ids[index] = self._random.randrange(256)
        return found


class InProcessEngine:
    """vLLM's synchronous engine with our worker, scheduler and input processor in this process.

    A context, after which its memory is free. Other engines of the process go on: see `conftest.shared_groups`.
    """

    def __init__(self, fusion_path: Path, *, force_async: bool = False, **options: Any) -> None:
        fusion = load_fusion(fusion_path)
        # Else the schedule would depend on how busy the machine is.
        options = {"max_step_seconds": 0, "speculation": {"max_tokens": 0}, **options}
        args = AsyncEngineArgs(**engine_arguments(fusion, inspect_fusion(fusion), options))
        if force_async:
            args = AsyncOnCPUEngineArgs(**{f.name: getattr(args, f.name) for f in fields(args)})
        self.llm = LLMEngine.from_engine_args(args)
        self.llm.input_processor = FusedInputProcessor(self.llm.input_processor)
        self.steps = StepFeed(self.llm.output_processor, fusion.specialist_names)
        self.reports: list[StepReport] = []
        self.steps.listen(self.reports.append)
        self._count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with mock.patch.object(gc, "collect"):  # once is enough, and not once for each runner
            self.llm.engine_core.shutdown()
        del self.llm
        gc.collect()

    @property
    def scheduler(self) -> Scheduler:
        """The engine's scheduler."""
        return self.llm.engine_core.engine_core.scheduler

    @property
    def runner(self) -> FusedModelRunner:
        """The fused model runner of the only worker."""
        return self.llm.engine_core.engine_core.model_executor.driver_worker.worker.model_runner

    @property
    def drafter(self) -> Drafter:
        """Who guesses the next tokens; a test may put another one there."""
        assert self.runner.speculation is not None
        return self.runner.speculation.drafter

    @drafter.setter
    def drafter(self, drafter: Drafter) -> None:
        assert self.runner.speculation is not None
        self.runner.speculation.drafter = drafter

    def generate(self, arrivals: Sequence[Arrival]) -> list[RequestOutput]:
        """Serve the requests, each arriving at its step; the last output of each, in the order given."""
        names = self.next_ids(len(arrivals))
        self._count += len(arrivals)
        waiting = sorted(zip(names, arrivals, strict=True), key=lambda pair: pair[1].step)
        aborts: dict[int, list[str]] = {}
        last: dict[str, RequestOutput] = {}
        step = 0
        while waiting or self.llm.has_unfinished_requests():
            while waiting and waiting[0][1].step <= step:
                name, arrival = waiting.pop(0)
                self._add(name, arrival)
                if arrival.abort_after is not None:
                    aborts.setdefault(step + arrival.abort_after, []).append(name)
            self.llm.abort_request(aborts.pop(step, []))
            for output in self.llm.step():
                for completion in output.outputs:
                    Takeover().take(completion)
                last[output.request_id] = output
            step += 1
            assert step < 5000, "the engine does not come to an end"
        return [last.get(name) for name in names]

    def next_ids(self, count: int) -> list[str]:
        """The ids that the next so many requests will have."""
        return [f"r{self._count + i}" for i in range(count)]

    def tokens(self, arrivals: Sequence[Arrival]) -> list[list[int]]:
        """The generated token ids of each request."""
        return [list(output.outputs[0].token_ids) for output in self.generate(arrivals)]

    def _add(self, name: str, arrival: Arrival) -> None:
        extras = {} if arrival.cache_salt is None else {"cache_salt": arrival.cache_salt}
        params = arrival.params.clone()
        params.output_kind = RequestOutputKind.FINAL_ONLY
        self.llm.add_request(name, engine_input(arrival.prompts, **extras), params)


def engine_input(prompts: Prompts, **extras: Any) -> Any:
    """An engine input as rendering makes it: the longest prompt is canonical."""
    return {**fused_input(prompts), **extras}


def random_prompts(lengths: Sequence[int], seed: int, num_ids: int = 256) -> Prompts:
    """One random prompt of each length."""
    rng = random.Random(seed)
    return [[rng.randrange(num_ids) for _ in range(length)] for length in lengths]


def serve(engine: InProcessEngine, drafter: Drafter, arrivals: Sequence[Arrival]) -> tuple[list[Any], int]:
    """The outputs, and how many steps they took."""
    num_before, usual = len(engine.reports), engine.drafter
    engine.drafter = drafter
    try:
        return engine.generate(arrivals), len(engine.reports) - num_before
    finally:
        engine.drafter = usual


def greedy(max_tokens: int, **kwargs: Any) -> SamplingParams:
    """Greedy decoding that does not stop at EOS."""
    options: Mapping[str, Any] = {"ignore_eos": True, "max_tokens": max_tokens} | kwargs
    return SamplingParams(temperature=0.0, **options)
