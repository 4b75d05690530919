"""vLLM engines inside this process, fused or plain, stepped by hand: the same settings, threads and seam for both.

Everything runs in one process, so that an engine that waits takes no time from the one that is measured: vLLM's own
worker processes poll shared memory for a second after each step, which two cores cannot spare.
"""

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from vllm import LLM, SamplingParams
from vllm.compilation.cuda_graph import CUDAGraphWrapper
from vllm.inputs import EngineInput, tokens_input
from vllm.sampling_params import RequestOutputKind

from benchmarks.workload import Prompts, Request
from ultrafuser.gating.model.fusion import FusedModelInfo, FusionConfig
from ultrafuser.gating.model.schema import SpeculationSettings
from ultrafuser.server.engine.shared.dtype import dtypes_of
from ultrafuser.server.engine.shared.extra_args import fused_input
from ultrafuser.server.engine.shared.options import OWN_OPTIONS
from ultrafuser.server.llm import FusedLLM


class StepEngine:
    """One engine and the requests it works on."""

    def __init__(self, llm: LLM, to_input: Callable[[Prompts], EngineInput]) -> None:
        """`to_input` makes an engine input out of the specialists' prompts."""
        self._llm, self._engine = llm, llm.llm_engine
        self._to_input = to_input
        self._ids = itertools.count()
        self._token_ids: dict[str, list[int]] = {}

    @property
    def llm(self) -> Any:
        """vLLM's `LLM`, plain or fused."""
        return self._llm

    @property
    def token_ids(self) -> list[list[int]]:
        """The responses so far, in the order of the requests."""
        return list(self._token_ids.values())

    def start(self, requests: Sequence[Request]) -> None:
        """Take requests and compute until each has its first token.

        Raises:
            RuntimeError: all have ended, one of them without a token, as where a value is not finite.
        """
        self._token_ids = {}
        for request in requests:
            self.add(request)
        while not all(self._token_ids.values()):
            if self.is_idle:
                raise RuntimeError(f"{sum(not ids for ids in self._token_ids.values())} requests ended without a token")
            self.step()

    def add(self, request: Request) -> None:
        """Queue one more request."""
        name = str(next(self._ids))
        self._token_ids[name] = []
        params = SamplingParams(
            temperature=request.temperature,
            seed=request.seed,
            max_tokens=request.num_tokens,
            ignore_eos=not request.may_end_early,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self._engine.add_request(name, self._to_input(request.prompts), params)

    def step(self) -> int:
        """One step of the engine; returns the number of requests that finished in it."""
        outputs: Any = self._engine.step()
        for output in outputs:
            self._token_ids[output.request_id].extend(output.outputs[0].token_ids)
        return sum(output.finished for output in outputs)

    def stop(self) -> None:
        """Abort what is not finished."""
        self._engine.abort_request(list(self._token_ids))
        while self._engine.has_unfinished_requests():
            self._engine.step()

    @property
    def is_idle(self) -> bool:
        """Whether all requests have ended."""
        return not self._engine.has_unfinished_requests()

    def forget_prefixes(self) -> None:
        """Empty the prefix cache, so that what was computed before cannot be reused."""
        self._llm.reset_prefix_cache()

    def finish(self, requests: Sequence[Request]) -> list[list[int]]:
        """The whole responses to requests that arrive at once."""
        self.start(requests)
        while not self.is_idle:
            self.step()
        return self.token_ids


class ContinuousBatching:
    """All requests through one engine, at most `num_slots` at a time: a finished one makes room for the next."""

    def __init__(self, engine: StepEngine, requests: Sequence[Request], num_slots: int) -> None:
        self._engine = engine
        self._waiting = deque(requests)
        self._free = num_slots
        self._num_tokens = sum(request.num_tokens for request in requests)
        engine.start([])

    @property
    def progress(self) -> float:
        """Share of all tokens that are generated."""
        return sum(map(len, self._engine.token_ids)) / self._num_tokens

    def step(self) -> None:
        """Fill the free slots and step."""
        while self._free and self._waiting:
            self._engine.add(self._waiting.popleft())
            self._free -= 1
        self._free += self._engine.step()


def fused_engine(fusion: FusionConfig, *, executor: str = "uni", **settings: Any) -> StepEngine:
    """The fused engine of a materialized fusion, some of whose engine settings are others.

    Without `speculation` one step is one token of every request. With another `executor` its ranks are processes.
    """
    settings = {"speculation": SpeculationSettings(max_tokens=0), **settings}
    fusion = fusion.model_copy(update={"engine": fusion.engine.model_copy(update=settings)})
    with in_this_process():
        return StepEngine(FusedLLM(fusion, distributed_executor_backend=executor), fused_input)


def plain_engine(fusion: FusionConfig, info: FusedModelInfo, index: int = 0) -> StepEngine:
    """Plain vLLM on one of the fusion's specialists, with vLLM's own worker, scheduler and the fusion's settings; what
    it is asked is a request's first prompt."""
    with in_this_process():
        llm = LLM(**plain_engine_options(fusion, info, index) | {"distributed_executor_backend": "uni"})
        return StepEngine(llm, lambda prompts: tokens_input(prompts[0]))


def plain_engine_options(fusion: FusionConfig, info: FusedModelInfo, index: int) -> dict[str, Any]:
    """vLLM's engine options for one specialist alone, as the fusion file sets them for all."""
    specialist = fusion.specialists[index]
    settings = fusion.engine.model_dump(exclude_none=True, exclude=set(OWN_OPTIONS))
    return {
        "max_model_len": info.max_model_len,
        **settings,
        "model": specialist.model,
        "revision": specialist.revision,
        "dtype": dtypes_of(fusion)[index],
        "quantization": specialist.quantization,
        "generation_config": "vllm",
    }


@contextmanager
def in_this_process() -> Iterator[None]:
    """Start vLLM without processes of its own, and with all the threads and CUDA graphs that were there before.

    vLLM reads the variable while it starts; servers that are started later must not see it. An engine that profiles its
    own graphs throws away those of all engines in the process.
    """
    num_threads = torch.get_num_threads()
    captured = {own: dict(own.concrete_cudagraph_entries) for own in list(CUDAGraphWrapper._all_instances)}
    with patch.dict(os.environ, {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}):
        yield
    for wrapper, graphs in captured.items():
        wrapper.concrete_cudagraph_entries.update(graphs)
    if torch.get_num_threads() != num_threads:
        torch.set_num_threads(num_threads)
