"""vLLM workers that hold n specialists: one mix-in over vLLM's workers, and the one for GPUs.

Everything a worker does (device, memory, profiling, CUDA graphs, tensor parallelism) stays vLLM's; the
mix-in only replaces the worker's model runner by n of them. `VllmConfig.additional_config` says which.
Knows no CPU: to import vLLM's worker for it takes the GPU away (`server/engine/worker/cpu_worker.py`).
"""

import copy
from typing import Any

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu_worker import Worker

from ultrafuser.gating.model.gate import load_gate
from ultrafuser.server.engine.shared.spec import EngineSpec, SpecialistSpec
from ultrafuser.server.engine.worker.fused_step import FusedModelRunner
from ultrafuser.server.engine.worker.mixing import Mixer
from ultrafuser.server.engine.worker.specialists import Specialists
from ultrafuser.server.engine.worker.speculation import Speculation


class FusedWorkerMixin(Worker):
    """Builds the followers' runners beside the leader's, which vLLM's worker has built itself."""

    model_runner: Any
    """vLLM's own until `init_device` has run, then the fused one."""

    def init_device(self) -> None:
        """Set up the device as vLLM does, then put n model runners in the place of one."""
        super().init_device()
        spec = EngineSpec.from_vllm_config(self.vllm_config)
        runners = [self.model_runner]
        for specialist in spec.specialists[1:]:
            config = follower_config(self.vllm_config, specialist)
            with set_current_vllm_config(config):
                runners.append(type(runners[0])(config, self.device))
        specialists = Specialists(runners, spec.names)
        speculation = None
        if spec.speculation is not None:
            speculation = Speculation(runners, spec.speculation, spec.num_shared_ids)
        self.model_runner = FusedModelRunner(specialists, lambda: self._load_mixer(spec), speculation)

    def _load_mixer(self, spec: EngineSpec) -> Mixer:
        gate = load_gate(spec.gate, spec.names, spec.hidden_sizes).to(self.device).eval() if spec.gate else None
        return Mixer(gate, spec.num_shared_ids)


class FusedGPUWorker(FusedWorkerMixin, Worker):
    """n specialists on a GPU; with tensor parallelism every rank holds a shard of each."""

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """As vLLM's; blocks must be zeroed when a request went wrong, which vLLM prepares for other caches only."""
        super().initialize_from_config(kv_cache_config)
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
