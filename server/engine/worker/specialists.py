"""The specialists in one worker: n vLLM model runners, each with its own weights and its own KV tensors.

What is done n times is done here: load, profile, size and allocate caches, capture, forward. Knows runners and plans;
what becomes of the n results is the fused step's business. What is asked of one runner and not overridden here is
answered by the leader, the first.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

from vllm.config import set_current_vllm_config
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.workspace import is_workspace_manager_initialized, unlock_workspace

from ultrafuser.server.engine.shared.row import Row
from ultrafuser.server.engine.worker.graphs import SingleTokenGraphs
from ultrafuser.server.engine.worker.kv_plan import own_kv_cache_config, plan_in_full
from ultrafuser.server.engine.worker.scope import scope_of
from ultrafuser.server.engine.worker.timing import StepClock
from ultrafuser.server.engine.worker.warming import keeping_workspace

_ASKED_OF_ALL = frozenset(
    {
        "_dummy_run",
        "_init_kv_zero_meta",
        "profile_run",
        "shutdown",
        "update_max_model_len",
        "warming_up_model",
    }
)
"""What vLLM's worker asks of one runner and every one must do; the leader's result is given back."""


class Specialists:
    """The specialists' model runners, where vLLM's worker asks one."""

    def __init__(self, runners: list[GPUModelRunner], names: Mapping[int, str]) -> None:
        """`names` by the place in the fusion file; `runners[0]` is the leader, if that has place 0."""
        self.leader, self.followers = runners[0], runners[1:]
        self.runners, self.names, self.indices = runners, list(names.values()), list(names)
        for runner, name in zip(self.runners, self.names, strict=True):
            plan_in_full(runner, name)
            runner.single_tokens = SingleTokenGraphs(runner)

    def __getattr__(self, name: str) -> Any:
        if name in _ASKED_OF_ALL:
            return lambda *args, **kwargs: self._for_each(lambda runner: getattr(runner, name)(*args, **kwargs))[0]
        return getattr(self.__dict__["leader"], name)

    def forward(self, plans: Iterable[SchedulerOutput], clock: StepClock) -> ModelRunnerOutput | None:
        """Run each specialist over its own plan; hidden states and logits stay in the runners' `execute_model_state`.

        Returns what the last one does: None, or vLLM's empty output if its plan is empty.
        """
        idle: ModelRunnerOutput | None = None
        for name, runner, plan in zip(self.names, self.runners, plans, strict=True):
            # An empty plan is executed too: it carries the finished ids, and ends what async scheduling kept of the
            # runner's last step (vLLM drops it with every request that leaves the batch).
            num_drafts = sum(map(len, plan.scheduled_spec_decode_tokens.values()))
            num_tokens = plan.total_num_scheduled_tokens - num_drafts
            is_timed = clock.forward(name, num_tokens, len(plan.num_scheduled_tokens))
            with is_timed, runner.single_tokens.for_step(plan):
                idle = runner.execute_model(plan)
            if self.leader.num_prompt_logprobs and runner is not self.runners[-1]:
                _keep_hidden_states(runner)
        return idle

    def load_model(self, load_dummy_weights: bool = False) -> None:
        """Load every specialist's weights."""
        for runner in self.runners:
            with scope_of(runner):
                runner.load_model(load_dummy_weights)

    @property
    def model_memory_usage(self) -> int:
        """Bytes of all specialists' weights, as vLLM's memory profiling subtracts them."""
        return sum(int(runner.model_memory_usage) for runner in self.runners)

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """Union of the runners' specs, layer names prefixed by the specialist: one plan sizes all of them.

        Raises:
            ValueError: a layer keeps something else than keys and values of single tokens.
        """
        union: dict[str, KVCacheSpec] = {}
        for name, runner in zip(self.names, self.runners, strict=True):
            union |= {f"{name}/{layer}": spec for layer, spec in runner.get_kv_cache_spec().items()}
        return union

    def initialize_kv_cache(
        self,
        kv_cache_config: KVCacheConfig,
        is_profiling: bool = False,
        kv_cache_allocation_context: AbstractContextManager[None] | None = None,
    ) -> None:
        """Allocate each specialist's own KV tensors with the block count of the common plan."""
        self._for_each(
            lambda runner: runner.initialize_kv_cache(
                own_kv_cache_config(runner, kv_cache_config),
                is_profiling,
                kv_cache_allocation_context=kv_cache_allocation_context,
            )
        )

    def profile_cudagraph_memory(self) -> int:
        """Bytes that the CUDA graphs of all specialists will take: as many for each as are foreseen for the largest.

        Those that are profiled later find memory that the first have left, and seem to need half as much (on an H100
        three models of 7B took 0.86 GiB, where 0.23, 0.12 and 0.12 were foreseen).
        """
        return len(self.runners) * max(self._for_each(_foreseen_graph_bytes))

    @property
    def jit_warmup_registry(self) -> SimpleNamespace:
        """What vLLM's warm-up compiles before the first request: the kernels that all specialists have registered."""
        return SimpleNamespace(warmup=lambda: self._for_each(lambda runner: runner.jit_warmup_registry.warmup()))

    def capture_model(self) -> int:
        """Capture every specialist's CUDA graphs; the sum of their bytes."""
        num_bytes = 0
        for name, runner in zip(self.names, self.runners, strict=True):
            if is_workspace_manager_initialized():
                unlock_workspace()  # capture locks it, and the next specialist may need resources of its own there
            is_first = runner is self.leader
            with set_current_vllm_config(runner.vllm_config), nullcontext() if is_first else keeping_workspace(name):
                num_bytes += runner.capture_model() + runner.single_tokens.capture()
        return num_bytes

    def _for_each(self, call: Callable[[GPUModelRunner], Any]) -> list[Any]:
        results = []
        for runner in self.runners:
            with set_current_vllm_config(runner.vllm_config):
                results.append(call(runner))
        return results


def _foreseen_graph_bytes(runner: GPUModelRunner) -> int:
    """As vLLM foresees for its own graphs, and for those of single tokens as much each."""
    num_bytes = int(runner.profile_cudagraph_memory())
    if not runner.single_tokens.are_wanted:
        return num_bytes
    num_sizes = len(runner.compilation_config.cudagraph_capture_sizes)
    return num_bytes * (num_sizes + len(runner.single_tokens.sizes)) // num_sizes


def _keep_hidden_states(runner: GPUModelRunner) -> None:
    """Take all of a step's hidden states out of a CUDA graph's memory, where the next specialist's graphs write.

    vLLM copies only the rows that it samples from. A step of more rows than any graph has is computed without one.
    """
    state = runner.execute_model_state
    if state is not None and len(state.hidden_states) <= (runner.compilation_config.max_cudagraph_capture_size or 0):
        runner.execute_model_state = state._replace(hidden_states=state.hidden_states.clone())


def rows_of(runner: GPUModelRunner, num_outputs: Mapping[str, int]) -> list[Row]:
    """What each row of a runner's logits is, after its forward pass; none if its plan was empty.

    `num_outputs` has the output tokens so far of every scheduled request.
    """
    if runner.execute_model_state is None:
        return []
    drafts = runner.execute_model_state.spec_decode_metadata
    return [
        Row(request, num_outputs[request] + index, is_draft=index > 0, slot=slot)
        for slot, request in enumerate(runner.input_batch.req_ids)
        for index in range(1 if drafts is None else 1 + drafts.num_draft_tokens[slot])
    ]


def unfinished_slots(runner: GPUModelRunner) -> set[int]:
    """Places in a runner's batch whose prefill is not finished with this step."""
    num_requests = runner.input_batch.num_reqs
    return set(runner.discard_request_mask.np[:num_requests].nonzero()[0].tolist())


def ending_rows(runner: GPUModelRunner, rows_R: Sequence[Row]) -> list[Row]:
    """Those of a runner's rows that end in a token."""
    unfinished = unfinished_slots(runner)
    return [row for row in rows_R if row.slot not in unfinished]
