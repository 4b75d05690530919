"""vLLM's multiprocess executor with n times as many workers: a tensor-parallel group for each specialist.

vLLM lays ranks out as (outer, data, pipeline, context, tensor) and lets the outer dimension be what is left, so that a
world n times as large as one model needs gives every specialist groups of its own: rank s * t + i holds shard i of
specialist s, where t is the tensor-parallel size. Knows processes, not what they compute.
"""

from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from ultrafuser.server.engine.shared.spec import EngineSpec


class SplitExecutor(MultiprocExecutor):
    """Starts the ranks of all specialists; the leader's first answers for all."""

    def _get_parallel_sizes(self) -> tuple[int, int, int]:
        num_specialists = len(EngineSpec.from_vllm_config(self.vllm_config).specialists)
        self.parallel_config.world_size = num_specialists * self.parallel_config.tensor_parallel_size
        super()._get_parallel_sizes()
        return self.world_size, 1, 1

    def _get_output_rank(self) -> int:
        return 0
