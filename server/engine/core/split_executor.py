"""vLLM's multiprocess executor with n times as many workers: a tensor-parallel group for each specialist.

vLLM lays ranks out as (outer, data, pipeline, context, tensor) and lets the outer dimension be what is left, so that a
world n times as large as one model needs gives every specialist groups of its own: rank s * t + i holds shard i of
specialist s, where t is the tensor-parallel size. Knows processes, not what they compute.
"""

import os

from vllm.platforms import current_platform
from vllm.utils.cpu_resource_utils import get_allowed_cpu_list

from ultrafuser.server.engine.core.ending_executor import EndingExecutor
from ultrafuser.server.engine.shared.spec import EngineSpec


class SplitExecutor(EndingExecutor):
    """Starts the ranks of all specialists; the leader's first answers for all."""

    def _get_parallel_sizes(self) -> tuple[int, int, int]:
        num_specialists = len(EngineSpec.from_vllm_config(self.vllm_config).specialists)
        self.parallel_config.world_size = num_specialists * self.parallel_config.tensor_parallel_size
        super()._get_parallel_sizes()
        if current_platform.is_cpu():
            # By itself vLLM binds each rank to a NUMA node of its own, and most machines have but one.
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", shares_of_cores(self.local_world_size))
        return self.world_size, 1, 1

    def _get_output_rank(self) -> int:
        return 0


def shares_of_cores(num_ranks: int) -> str:
    """As many cores for each rank, in the form of vLLM's variable: one is left to the scheduler if there are more cores
    than ranks; if there are fewer, ranks share them."""
    ids = sorted({cpu.physical_core: cpu.id for cpu in get_allowed_cpu_list()}.values())
    size = (len(ids) - 1) // num_ranks
    shares = [ids[rank * size : (rank + 1) * size] or [ids[rank % len(ids)]] for rank in range(num_ranks)]
    return "|".join(",".join(map(str, own)) for own in shares)
