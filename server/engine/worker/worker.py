"""vLLM workers that hold n specialists: one mix-in over vLLM's workers, and the one for GPUs.

Everything a worker does (device, memory, profiling, CUDA graphs, tensor parallelism) stays vLLM's; the
mix-in only replaces the worker's model runner by n of them. `VllmConfig.additional_config` says which.
Knows no CPU: to import vLLM's worker for it takes the GPU away (`server/engine/worker/cpu_worker.py`).
"""

import copy
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from ultrafuser.gating.model.gate_file import load_gate
from ultrafuser.server.engine.shared.spec import EngineSpec, SpecialistSpec
from ultrafuser.server.engine.worker.drafting import Drafter, LeadingDrafter
from ultrafuser.server.engine.worker.exchange import Exchange
from ultrafuser.server.engine.worker.experience import DraftCost
from ultrafuser.server.engine.worker.fused_step import FusedModelRunner
from ultrafuser.server.engine.worker.gate_parts import GateParts
from ultrafuser.server.engine.worker.groups import make_own_ranks_the_world
from ultrafuser.server.engine.worker.mixing import Mixer
from ultrafuser.server.engine.worker.output_heads import introduce, meet
from ultrafuser.server.engine.worker.specialists import Specialists
from ultrafuser.server.engine.worker.speculation import Speculation
from ultrafuser.server.engine.worker.split_drafting import AskedDrafter, AskingDrafter
from ultrafuser.server.engine.worker.split_mixing import GatheringMixer, Kinds, SendingMixer
from ultrafuser.server.engine.worker.split_step import SplitFollower, SplitLeader

logger = logging.getLogger(f"vllm.{__name__}")  # below vLLM's, which alone is written in a worker's process


class FusedWorkerMixin(Worker):
    """Builds the followers' runners beside the leader's, which vLLM's worker has built itself."""

    model_runner: Any
    """vLLM's own until `init_device` has run, then the fused one."""

    def __init__(self, vllm_config: VllmConfig, local_rank: int, rank: int, *args: Any, **kwargs: Any) -> None:
        """As vLLM's; a rank of a follower's own works with that follower's configuration."""
        self._spec = EngineSpec.from_vllm_config(vllm_config)
        self._index = rank // vllm_config.parallel_config.tensor_parallel_size if self._spec.exchange else 0
        if self._index:
            vllm_config = follower_config(vllm_config, self._spec.specialists[self._index])
        super().__init__(vllm_config, local_rank, rank, *args, **kwargs)

    def init_device(self) -> None:
        """Set up the device as vLLM does, under the leader's configuration on every rank, then put n model runners in
        the place of one."""
        super().init_device()
        if self._spec.exchange is not None:
            self.model_runner = self._split_runner(self._spec.exchange)
            return
        spec = self._spec
        runners = [self.model_runner]
        for specialist in spec.specialists[1:]:
            runners.append(self._runner_of(follower_config(self.vllm_config, specialist)))
        specialists = Specialists(runners, dict(enumerate(spec.names)))
        speculation = self._speculation(runners[0], partial(LeadingDrafter, runners, spec.num_shared_ids))

        def mixing() -> Mixer:
            return Mixer(self._gate_parts(specialists) if spec.gate else None, spec.num_shared_ids)

        self.model_runner = FusedModelRunner(specialists, mixing, speculation)

    def _speculation(self, leader: GPUModelRunner, leading: Callable[[DraftCost], Drafter]) -> Speculation | None:
        """Guessing ahead, if that is asked for, where `leading` makes the drafter by which specialists go on."""
        spec = self._spec
        if spec.speculation is None:
            return None
        side_by_side = spec.exchange is not None
        return Speculation(leader, spec.speculation, len(spec.names), spec.num_shared_ids, leading, side_by_side)

    def determine_available_memory(self) -> int:
        """As vLLM's; an error ends the process of a rank that nobody listens to."""
        with self._fatal_errors():
            return super().determine_available_memory()

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """As vLLM's; an error ends the process of a rank that nobody listens to."""
        with self._fatal_errors():
            super().initialize_from_config(kv_cache_config)

    def compile_or_warm_up_model(self) -> Any:
        """As vLLM's; an error ends the process of a rank that nobody listens to."""
        with self._fatal_errors():
            return super().compile_or_warm_up_model()

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        """As vLLM's; an error ends the process of a rank that nobody listens to."""
        with self._fatal_errors():
            return super().execute_model(scheduler_output)

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> Any:
        """As vLLM's; an error ends the process of a rank that nobody listens to."""
        with self._fatal_errors():
            return super().sample_tokens(grammar_output)

    @contextmanager
    def _fatal_errors(self) -> Iterator[None]:
        """vLLM hears the errors of rank 0 alone, which waits for the others: an error of theirs ends their process, and
        that it notices. At once, since an orderly end waits for what is under way between the ranks."""
        try:
            yield
        except Exception:
            if self.rank == 0:
                raise
            logger.exception("rank %d cannot go on", self.rank)
            os._exit(1)

    def _runner_of(self, config: VllmConfig) -> GPUModelRunner:
        with set_current_vllm_config(config):
            return type(self.model_runner)(config, self.device)

    def _split_runner(self, what: Literal["logits", "hidden"]) -> SplitLeader | SplitFollower:
        """The runner of one specialist, whose ranks send or are sent `what` for each row."""
        spec, index = self._spec, self._index
        exchange = Exchange(len(spec.specialists), self.parallel_config.tensor_parallel_size)
        make_own_ranks_the_world()
        runner = self._runner_of(self.vllm_config) if index else self.model_runner
        specialists, num_shared_ids = Specialists([runner], {index: spec.names[index]}), spec.num_shared_ids
        drafter = spec.speculation and (spec.speculation.drafter or "leading")
        kinds: Kinds = ("logits", "hidden") if what == "logits" and drafter == "head" else (what,)

        def gathering() -> GatheringMixer:
            parts = self._gate_parts(specialists)
            return GatheringMixer(parts, num_shared_ids, spec.names, kinds, exchange, meet(exchange))

        def sending() -> SendingMixer:
            introduce(runner, spec.names[index], what, num_shared_ids, exchange)
            return SendingMixer(self._gate_parts(specialists), num_shared_ids, kinds, exchange)

        if index:
            asked = AskedDrafter(runner, index, num_shared_ids, exchange) if drafter == "leading" else None
            return SplitFollower(specialists, sending, exchange, asked)
        speculation = self._speculation(runner, partial(AskingDrafter, runner, num_shared_ids, exchange))
        return SplitLeader(specialists, gathering, exchange, speculation)

    def _gate_parts(self, specialists: Specialists) -> GateParts:
        """The gate, for the specialists that this rank has."""
        spec, leader = self._spec, specialists.leader
        assert spec.gate is not None
        gate = load_gate(spec.gate, spec.names, spec.hidden_sizes).to(self.device).eval()
        return GateParts(gate, specialists.indices, leader.scheduler_config.max_num_seqs, 1 + leader.num_spec_tokens)


class FusedGPUWorker(FusedWorkerMixin, Worker):
    """n specialists on a GPU; with tensor parallelism every rank holds a shard of each."""

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """As vLLM's; blocks must be zeroed when a request went wrong, which vLLM prepares for other caches only."""
        super().initialize_from_config(kv_cache_config)
        with self._fatal_errors():
            self.model_runner._init_kv_zero_meta()


def _room_for_drafts(leader: VllmConfig) -> dict[str, Any] | None:
    """The leader's speculative configuration as an engine argument: every runner computes a row behind each draft."""
    speculative = leader.speculative_config
    if speculative is None:
        return None
    return {name: getattr(speculative, name) for name in ("method", "model", "num_speculative_tokens")}


def follower_config(leader: VllmConfig, specialist: SpecialistSpec) -> VllmConfig:
    """A whole configuration for one follower, inside the leader's parallel group, cache and schedule.

    The shared configurations are assigned by attribute: `dataclasses.replace` would run `__post_init__`
    again, reset the shared scheduler configuration and carry the leader's quantization over.
    """
    parallel = leader.parallel_config
    args = EngineArgs(
        **specialist.engine_arguments(),
        max_model_len=leader.model_config.max_model_len,
        enforce_eager=leader.model_config.enforce_eager,
        seed=leader.model_config.seed,
        tensor_parallel_size=parallel.tensor_parallel_size,
        distributed_executor_backend=parallel.distributed_executor_backend,
        block_size=leader.cache_config.block_size,
        max_num_seqs=leader.scheduler_config.max_num_seqs,
        max_num_batched_tokens=leader.scheduler_config.max_num_batched_tokens,
        generation_config="vllm",
        speculative_config=_room_for_drafts(leader),
    )
    config = args.create_engine_config()
    for shared in ("parallel_config", "cache_config", "scheduler_config", "device_config", "load_config"):
        setattr(config, shared, getattr(leader, shared))
    config.additional_config = copy.copy(leader.additional_config)
    return config
