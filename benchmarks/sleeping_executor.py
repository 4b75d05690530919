"""vLLM's executor without a model: a step takes its time and gives every request that is due the next token of a text.

Knows steps and requests; the scheduler that calls it, and whose prefix cache decides which tokens are read, is real.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np
from vllm.tokenizers import get_tokenizer
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.executor.abstract import Executor
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.worker.worker_base import CompilationTimes

from benchmarks.sleeping import Pace
from ultrafuser.server.engine.shared.row import Row
from ultrafuser.server.engine.shared.spec import EngineSpec
from ultrafuser.server.engine.shared.step import NUM_OTHER_MARKS, Span, StepRecord

TEXT = "the quick brown fox jumps over a lazy dog and runs back to its den "
"""What every response says, again and again: of each token of it a client sees something."""

_AMPLE_BYTES = 1 << 40


class SleepingExecutor(Executor):
    """One per engine core; `pace` is set before the first is made."""

    pace: Pace

    def _init_executor(self) -> None:
        self._text_ids: list[int] = get_tokenizer(self.model_config.tokenizer).encode(TEXT, add_special_tokens=False)
        self._specialists = EngineSpec.from_vllm_config(self.vllm_config).names
        self._num_prompt: dict[str, int] = {}
        self._num_given: dict[str, int] = {}

    def execute_model(self, scheduler_output: SchedulerOutput, non_block: bool = False) -> Any:
        """Sleep as long as the step takes, then give the tokens; a prompt that is not read to its end gets none yet."""
        begin = time.monotonic()
        for name in scheduler_output.finished_req_ids:
            self._num_prompt.pop(name, None)
            self._num_given.pop(name, None)
        num_computed = {new.req_id: new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs}
        for new in scheduler_output.scheduled_new_reqs:
            self._num_prompt[new.req_id], self._num_given[new.req_id] = len(new.prompt_token_ids or ()), 0
        cached = scheduler_output.scheduled_cached_reqs
        num_computed |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        tokens: dict[str, list[int]] = {}
        rows: list[Row] = []
        num_read = 0
        for name, count in scheduler_output.num_scheduled_tokens.items():
            num_given = self._num_given[name]
            is_due = num_computed[name] + count == self._num_prompt[name] + num_given
            is_decode = num_computed[name] >= self._num_prompt[name]
            num_read += 0 if is_decode else count
            tokens[name] = [self._text_ids[num_given % len(self._text_ids)]] if is_due else []
            if is_due:
                rows.append(Row(name, num_given, False, len(rows)))
                self._num_given[name] += 1
        seconds = self.pace.step_seconds + num_read * self.pace.prompt_token_seconds if tokens else 0
        output = ModelRunnerOutput(list(tokens), {name: at for at, name in enumerate(tokens)}, list(tokens.values()))
        output.step = self._record(rows, seconds)  # as our workers do
        time.sleep(max(begin + seconds - time.monotonic(), 0))
        return _done(output) if non_block else output

    def _record(self, rows: list[Row], seconds: float) -> StepRecord:
        """The report that our workers make of a step: all specialists agree, and each has the same weight."""
        num = len(self._specialists)
        marks_BX = np.zeros((len(rows), num + 1 + NUM_OTHER_MARKS), np.float32)
        marks_BX[:, :num] = 1 / num
        marks_BX[:, -2] = num
        return StepRecord(rows, marks_BX, [Span("decode", name, seconds / num) for name in self._specialists])

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        non_block: bool = False,
    ) -> Any:
        """What vLLM asks of its workers at the start; all else is nothing to do."""
        answer: Any = None
        match method:
            case "compile_or_warm_up_model":
                answer = CompilationTimes(0, 0)
            case "determine_available_memory":
                answer = _AMPLE_BYTES
            case "get_supported_kv_cache_layouts":
                answer = ["LBNHC"]
            case "get_supported_tasks":
                answer = ("generate",)
            case "get_kv_cache_spec":  # one layer: blocks are counted, none is kept
                size, dtype = self.model_config.get_head_size(), self.model_config.dtype
                block_size = self.cache_config.block_size
                answer = {
                    "made_up": FullAttentionSpec(block_size=block_size, num_kv_heads=1, head_size=size, dtype=dtype)
                }
        return _done([answer]) if non_block else [answer]

    def check_health(self) -> None:
        """Always well."""

    def shutdown(self) -> None:
        """Nothing to end."""


def _done(value: Any) -> "Future[Any]":
    future: Future[Any] = Future()
    future.set_result(value)
    return future
