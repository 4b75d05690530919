"""CUDA graphs for passes over one token of each request, where vLLM captures them for rounds of drafts alone.

With k drafts vLLM captures a whole pass for 1 + k tokens of each request. A step without drafts, and a specialist that
goes on alone, would be left the graphs of the parts between attentions: some hundred launches from Python for each
model. So single tokens get whole graphs of their own. Knows one runner and how it finds a graph; no requests.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from vllm.config import CUDAGraphMode
from vllm.forward_context import BatchDescriptor
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

_STEP = 8
"""Between numbers of requests that have a graph, from this one on: few rows cost a pass nothing."""


class SingleTokenGraphs:
    """The whole graphs of one runner's passes over single tokens: none where vLLM's own do, or where there are none."""

    def __init__(self, runner: GPUModelRunner) -> None:
        self._runner = runner
        self._dispatcher: CudagraphDispatcher | None = None

    @property
    def are_wanted(self) -> bool:
        """Whether vLLM will capture whole graphs, and none for single tokens."""
        mode = self._runner.compilation_config.cudagraph_mode
        is_whole = mode is not None and mode.separate_routine() and mode.decode_mode() == CUDAGraphMode.FULL
        return bool(is_whole and self._runner.uniform_decode_query_len > 1)

    @property
    def sizes(self) -> list[int]:
        """Numbers of requests that will have a graph."""
        largest = self._runner.compilation_config.max_cudagraph_capture_size or 0
        most = min(self._runner.scheduler_config.max_num_seqs, largest)
        return sorted({own for own in (1, 2, 4, *range(_STEP, most, _STEP), most) if 0 < own <= most})

    def capture(self) -> int:
        """Capture them, once vLLM has captured its own; the bytes that they take."""
        if not self.are_wanted or not self.sizes:
            return 0
        self._dispatcher = self._new_dispatcher()
        with self._instead_of_vllms(self._dispatcher):
            return int(self._runner.capture_model())

    def find(self, num_requests: int) -> tuple[CUDAGraphMode, BatchDescriptor]:
        """What to replay for a pass over one token of so many requests: a whole graph, its parts, or nothing."""
        if self._dispatcher is not None:
            mode, descriptor = self._dispatcher.dispatch(num_requests, uniform_decode=True)
            if mode != CUDAGraphMode.NONE:
                return mode, descriptor
        return self._runner.cudagraph_dispatcher.dispatch(num_requests)

    @contextmanager
    def for_step(self, plan: SchedulerOutput) -> Iterator[None]:
        """Have the runner find them in a step that gives each of its requests one token, and read no draft."""
        num_requests = len(plan.num_scheduled_tokens)
        is_single = 0 < num_requests == plan.total_num_scheduled_tokens
        if self._dispatcher is None or not is_single or self.find(num_requests)[0] != CUDAGraphMode.FULL:
            yield
            return
        with self._instead_of_vllms(self._dispatcher):
            yield

    @contextmanager
    def _instead_of_vllms(self, dispatcher: CudagraphDispatcher) -> Iterator[None]:
        runner = self._runner
        before = runner.cudagraph_dispatcher, runner.uniform_decode_query_len
        runner.cudagraph_dispatcher, runner.uniform_decode_query_len = dispatcher, 1
        try:
            yield
        finally:
            runner.cudagraph_dispatcher, runner.uniform_decode_query_len = before

    def _new_dispatcher(self) -> CudagraphDispatcher:
        config = copy.copy(self._runner.vllm_config)
        config.compilation_config = copy.copy(config.compilation_config)
        config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
        # vLLM's sizes are multiples of 1 + k, and leave out the largest number of requests if that is none.
        config.compilation_config.cudagraph_capture_sizes = self.sizes
        config.compilation_config.max_cudagraph_capture_size = self.sizes[-1]
        dispatcher = CudagraphDispatcher(config)
        dispatcher.uniform_decode_query_len = 1
        dispatcher.initialize_cudagraph_keys(CUDAGraphMode.FULL_DECODE_ONLY, uniform_decode_query_len=1)
        return dispatcher
