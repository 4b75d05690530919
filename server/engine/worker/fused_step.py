"""n vLLM model runners that behave as one: the object a vLLM worker holds as its `model_runner`.

Each specialist is an ordinary vLLM model runner with its own weights and its own KV tensors. Runner 0, the
leader, samples with vLLM's own sampler; the others get the leader's tokens. Whatever the worker asks that is
not overridden here is answered by the leader.
"""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.sampling_params import SamplingParams
from vllm.v1.core.kv_cache_utils import get_kv_cache_configs
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheSpec
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.workspace import is_workspace_manager_initialized, unlock_workspace

from server.engine.worker.forcing import Forcing, forced_in_step
from server.engine.worker.mixing import Mixer, Rows
from server.engine.worker.output import FusedAsyncOutput, StepOnTheWay, name_all, with_step
from server.engine.worker.prompt_logprobs import PromptLogprobs
from server.engine.worker.sampling import FollowerSampler, LeaderSampler
from server.engine.worker.timing import StepClock
from server.engine.worker.view import SpecialistView, leader_sampling_params, neutral_sampling_params
from server.engine.worker.warming import JitWarmups, keeping_workspace, largest_step, sampling_by

_AMPLE_BYTES = 1 << 62
"""Memory given to a runner's own KV plan, whose size is decided by the common plan already."""


class FusedModelRunner:
    """The specialists' model runners behind the interface of a single one."""

    def __init__(self, runners: list[GPUModelRunner], names: list[str], load_mixer: Callable[[], Mixer]) -> None:
        """`runners[0]` is the leader; `load_mixer` is called once the weights are loaded."""
        self.leader, self.followers = runners[0], runners[1:]
        self.runners, self.names = runners, names
        self._load_mixer = load_mixer
        self._views = [
            SpecialistView(i, neutral_sampling_params if i else leader_sampling_params) for i in range(len(runners))
        ]
        self._clock = StepClock(self.leader.device)
        self._forcing = Forcing(self.leader.sampler)
        self._leader_sampler = LeaderSampler(self.leader.sampler)
        self.leader.sampler = self._leader_sampler
        for follower in self.followers:
            follower.sampler = FollowerSampler()
        self._scheduled: list[str] | None = None
        self._forced: dict[str, int] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["leader"], name)

    # Start-up: the worker's calls, once per runner.

    def load_model(self, load_dummy_weights: bool = False) -> None:
        """Load every specialist's weights, then the gate."""
        self._for_each(lambda runner: runner.load_model(load_dummy_weights=load_dummy_weights))
        self._mixer = self._load_mixer()
        PromptLogprobs(self.runners, self._mixer).attach()

    @property
    def model_memory_usage(self) -> int:
        """Bytes of all specialists' weights, as vLLM's memory profiling subtracts them."""
        return sum(int(runner.model_memory_usage) for runner in self.runners)

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """Union of the runners' specs, layer names prefixed by the specialist: one plan sizes all of them.

        Raises:
            ValueError: a layer is not plain full attention; such layers free blocks by the canonical length
                and would starve a specialist whose own prompt is shorter.
        """
        union: dict[str, KVCacheSpec] = {}
        for name, runner in zip(self.names, self.runners, strict=True):
            for layer, spec in runner.get_kv_cache_spec().items():
                if not _is_full_attention(spec):
                    raise ValueError(
                        f"specialists.{name}.model: layer {layer} keeps a {type(spec).__name__} KV cache; "
                        "only full attention can be fused, choose a model without sliding windows or state layers"
                    )
                union[f"{name}/{layer}"] = spec
        return union

    def initialize_kv_cache(
        self,
        kv_cache_config: KVCacheConfig,
        is_profiling: bool = False,
        kv_cache_allocation_context: AbstractContextManager[None] | None = None,
    ) -> None:
        """Allocate each specialist's own KV tensors with the block count of the common plan."""
        for runner in self.runners:
            with set_current_vllm_config(runner.vllm_config):
                runner.initialize_kv_cache(
                    _own_kv_cache_config(runner, kv_cache_config),
                    is_profiling,
                    kv_cache_allocation_context=kv_cache_allocation_context,
                )

    def _init_kv_zero_meta(self) -> None:
        self._for_each(lambda runner: runner._init_kv_zero_meta())

    def update_max_model_len(self, max_model_len: int) -> None:
        """Adopt a length that the engine decided (tokens)."""
        self._for_each(lambda runner: runner.update_max_model_len(max_model_len))

    def profile_run(self, *args: Any, **kwargs: Any) -> None:
        """Run every specialist once with the largest batch, then mix and sample once with all their results held."""
        with sampling_by(self._leader_sampler, self.followers):
            self._for_each(lambda runner: runner.profile_run(*args, **kwargs))
        with set_current_vllm_config(self.leader.vllm_config):
            rows = largest_step(self.runners)
            self._mixer.fuse_into_leader(rows, StepClock(self.leader.device))
            self.leader._dummy_sampler_run(rows[0].hidden_RD)
            self.leader._sync_device()

    def profile_cudagraph_memory(self) -> int:
        """Bytes that the CUDA graphs of all specialists will take."""
        return sum(self._for_each(lambda runner: runner.profile_cudagraph_memory()))

    @property
    def jit_warmup_registry(self) -> JitWarmups:
        """What vLLM's warm-up compiles before the first request."""
        return JitWarmups(self.runners)

    def warming_up_model(self) -> None:
        """Compile every specialist on the CPU."""
        with sampling_by(self._leader_sampler, self.followers):
            self._for_each(lambda runner: runner.warming_up_model())

    def _dummy_run(self, *args: Any, **kwargs: Any) -> Any:
        return self._for_each(lambda runner: runner._dummy_run(*args, **kwargs))[0]

    def capture_model(self) -> int:
        """Capture every specialist's CUDA graphs; the sum of their bytes."""
        num_bytes = 0
        for name, runner in zip(self.names, self.runners, strict=True):
            if is_workspace_manager_initialized():
                unlock_workspace()  # capture locks it, and the next specialist may need resources of its own there
            is_first = runner is self.leader
            with set_current_vllm_config(runner.vllm_config), nullcontext() if is_first else keeping_workspace(name):
                num_bytes += runner.capture_model()
        return num_bytes

    def shutdown(self) -> None:
        """Release what the runners hold."""
        self._for_each(lambda runner: runner.shutdown())

    # The decode step: schedule (translate), run, post-process.

    def execute_model(
        self, scheduler_output: SchedulerOutput, intermediate_tensors: None = None
    ) -> ModelRunnerOutput | None:
        """Forward passes of all specialists over their own views of the schedule; nothing is sampled yet."""
        idle: ModelRunnerOutput | None = None
        for name, runner, view in zip(self.names, self.runners, self._views, strict=True):
            plan = view.translate(scheduler_output)
            # An empty plan is executed too: it carries the finished ids, and ends what async scheduling kept of the
            # runner's last step (vLLM drops it with every request that leaves the batch).
            with self._clock.forward(name, plan.total_num_scheduled_tokens, len(plan.num_scheduled_tokens)):
                idle = runner.execute_model(plan)
        if scheduler_output.total_num_scheduled_tokens == 0:
            return idle
        self._scheduled = list(scheduler_output.num_scheduled_tokens)
        self._forced = forced_in_step(scheduler_output, self._params_of)
        return None

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> ModelRunnerOutput | AsyncModelRunnerOutput:
        """Mix, let the leader sample, give every follower the tokens, and name every scheduled request."""
        assert self._scheduled is not None, "sample_tokens() must follow execute_model()"
        scheduled, self._scheduled = self._scheduled, None
        output: ModelRunnerOutput | AsyncModelRunnerOutput = ModelRunnerOutput(
            req_ids=[], req_id_to_index={}, sampled_token_ids=[]
        )
        ending = _ending_rows(self.leader)
        step = StepOnTheWay(list(ending), self._mix(ending) if ending else None, self._clock)
        if self.leader.execute_model_state is not None:
            output = self._sample_leader(grammar_output)
        for follower in self.followers:
            if follower.execute_model_state is not None:
                follower.sampler.token_ids_R1 = self._tokens_for(follower, ending)
                follower.sample_tokens(None)
        if isinstance(output, AsyncModelRunnerOutput):
            return FusedAsyncOutput(output, scheduled, step)
        return with_step(name_all(output, scheduled), step)

    def _mix(self, ending: dict[str, int]) -> Tensor:
        rows = []
        for runner in self.runners:
            state = runner.execute_model_state
            index = runner.input_batch.req_id_to_index
            rows.append(Rows([index[req_id] for req_id in ending], state.sample_hidden_states, state.logits))
        fused_RV, marks_XB = self._mixer.fuse_into_leader(rows, self._clock)
        self.leader.execute_model_state = self.leader.execute_model_state._replace(logits=fused_RV)
        return marks_XB

    def _sample_leader(self, grammar_output: GrammarOutput | None) -> ModelRunnerOutput | AsyncModelRunnerOutput:
        """Sample; rows that end in no token must not advance their seeded generator.

        vLLM draws for such rows and rewinds the generator afterwards, which generators on the CPU refuse.
        """
        row_of = self.leader.input_batch.req_id_to_index
        self._forcing.set({row_of[request]: token for request, token in self._forced.items() if request in row_of})
        generators = self.leader.input_batch.generators
        unfinished = _unfinished_rows(self.leader)
        held = {row: generators.pop(row) for row in unfinished if row in generators}
        output = self.leader.sample_tokens(grammar_output)
        generators.update(held)
        return output

    def _params_of(self, req_id: str) -> SamplingParams | None:
        state = self.leader.requests.get(req_id)
        return state.sampling_params if state is not None else None

    def _tokens_for(self, follower: GPUModelRunner, ending: dict[str, int]) -> Tensor:
        """The leader's tokens [R, 1] in the order of the follower's rows; 0 where a row ends in no token."""
        req_ids = follower.input_batch.req_ids
        token_ids_R1 = self._leader_sampler.token_ids_R1
        if not ending or token_ids_R1 is None:
            return torch.zeros(len(req_ids), 1, dtype=torch.int64, device=follower.device)
        rows = [ending.get(req_id, 0) for req_id in req_ids]
        if rows == list(range(token_ids_R1.shape[0])):
            return token_ids_R1  # the common decode step: no index to copy to the device
        return token_ids_R1[torch.tensor(rows, device=token_ids_R1.device)]

    def _for_each(self, call: Callable[[GPUModelRunner], Any]) -> list[Any]:
        results = []
        for runner in self.runners:
            with set_current_vllm_config(runner.vllm_config):
                results.append(call(runner))
        return results


def _ending_rows(runner: GPUModelRunner) -> dict[str, int]:
    """Request id -> row, for the rows of this step that end in a token."""
    if runner.execute_model_state is None:
        return {}
    unfinished = set(_unfinished_rows(runner))
    return {req_id: row for row, req_id in enumerate(runner.input_batch.req_ids) if row not in unfinished}


def _unfinished_rows(runner: GPUModelRunner) -> list[int]:
    """Rows whose prefill is not finished with this step."""
    num_rows = runner.input_batch.num_reqs
    return [int(row) for row in runner.discard_request_mask.np[:num_rows].nonzero()[0]]


def _is_full_attention(spec: KVCacheSpec) -> bool:
    return (
        isinstance(spec, FullAttentionSpec)
        and getattr(spec, "sliding_window", None) is None
        and getattr(spec, "attention_chunk_size", None) is None
    )


def _own_kv_cache_config(runner: GPUModelRunner, common: KVCacheConfig) -> KVCacheConfig:
    """Plan one runner's layers again, with the block count that the common plan decided."""
    config: VllmConfig = copy.copy(runner.vllm_config)
    config.cache_config = copy.copy(config.cache_config)
    config.cache_config.num_gpu_blocks_override = common.num_blocks
    (own,) = get_kv_cache_configs(config, [runner.get_kv_cache_spec()], [_AMPLE_BYTES])
    own.kv_cache_layout = common.kv_cache_layout
    own.hash_block_size = common.hash_block_size
    own.cache_hit_alignment_tokens = common.cache_hit_alignment_tokens
    return own
