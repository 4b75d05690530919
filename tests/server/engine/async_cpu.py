"""Asynchronous scheduling on the CPU, for tests only: vLLM switches it off there, whatever the flag says.

The schedule, the runners' bookkeeping and the outputs are vLLM's own asynchronous ones; only the copy of
sampled tokens to the host, which needs CUDA streams, is replaced by a plain copy that is delivered late.
"""

from typing import Any

import vllm.v1.worker.gpu_model_runner as gpu_model_runner
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from ultrafuser.server.engine.worker.cpu_worker import FusedCPUWorker


class _NoEvent:
    def synchronize(self) -> None:
        """Nothing runs beside the CPU."""


class AsyncCPUOutput(AsyncModelRunnerOutput):
    """vLLM's `AsyncGPUModelRunnerOutput` without CUDA: tokens are copied now, handed over in `get_output`."""

    def __init__(
        self,
        model_runner_output: ModelRunnerOutput,
        sampled_token_ids: Any,
        logprobs_tensors: Any,
        invalid_req_indices: list[int],
        **_: Any,
    ) -> None:
        self._output = model_runner_output
        self._invalid = invalid_req_indices
        self._logprobs = logprobs_tensors.tolists() if logprobs_tensors is not None else None
        self.sampled_token_ids_cpu = sampled_token_ids.clone()
        self.async_copy_ready_event = _NoEvent()

    def get_output(self) -> ModelRunnerOutput:
        """The tokens, none for rows that end in no token."""
        token_ids = self.sampled_token_ids_cpu.tolist()
        for row in self._invalid:
            token_ids[row].clear()
        self._output.sampled_token_ids = token_ids
        self._output.logprobs = self._logprobs
        return self._output


class AsyncCPUWorker(FusedCPUWorker):
    """The fused CPU worker with asynchronous outputs."""

    def init_device(self) -> None:
        """As the fused worker; every runner must have been made for asynchronous scheduling."""
        gpu_model_runner.AsyncGPUModelRunnerOutput = AsyncCPUOutput
        super().init_device()
        for runner in self.model_runner.runners:
            assert runner.use_async_scheduling
            runner._get_or_create_async_output_copy_stream = lambda: None


class AsyncOnCPUEngineArgs(AsyncEngineArgs):
    """Engine arguments that force asynchronous scheduling after vLLM's platform has switched it off."""

    def create_engine_config(self, *args: Any, **kwargs: Any) -> VllmConfig:
        """As usual, then asynchronous."""
        config = super().create_engine_config(*args, **kwargs)
        config.scheduler_config.async_scheduling = True
        config.parallel_config.worker_cls = f"{AsyncCPUWorker.__module__}.{AsyncCPUWorker.__qualname__}"
        return config
