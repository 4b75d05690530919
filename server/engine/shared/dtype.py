"""Which type `engine.dtype: fastest` is on this machine, told from the processor's flags: the same at every start.

Measured at a start it could be another one after the next, and replicas would differ. Knows models by their number of
parameters only.
"""

import logging

import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.utils.cpu_resource_utils import get_memory_node_info

from ultrafuser.gating.model.fastest import fastest_on_a_cpu
from ultrafuser.gating.model.loading import empty_model
from ultrafuser.gating.model.schema import FusionConfig
from ultrafuser.server.engine.shared.quantization import computes_in_float32

logger = logging.getLogger(__name__)


def dtypes_of(fusion: FusionConfig) -> list[str]:
    """Each specialist's type in vLLM's terms, for a materialized fusion; says why if it had a choice.

    Where the choice falls on float32, specialists whose quantised weights vLLM computes in no such type take that of
    their own configuration.
    """
    default = fusion.engine.dtype or "auto"
    if default != "fastest":
        return [specialist.dtype or default for specialist in fusion.specialists]
    fastest, reason = _fastest(fusion)
    logger.info("dtype: %s, the fastest here: %s", fastest, reason)
    return [
        specialist.dtype or ("auto" if fastest == "float32" and not computes_in_float32(specialist) else fastest)
        for specialist in fusion.specialists
    ]


def _fastest(fusion: FusionConfig) -> tuple[str, str]:
    if not current_platform.is_cpu():
        return "auto", "that of each model's own configuration, on a device that is no CPU"
    return fastest_on_a_cpu(lambda: _float32_bytes(fusion), _memory_bytes(fusion))


def _float32_bytes(fusion: FusionConfig) -> int:
    """Bytes of all weights in float32, and of a cache of the wanted size, or else as large as the weights."""
    models = (empty_model(specialist) for specialist in fusion.specialists)
    weights = sum(torch.float32.itemsize * model.num_parameters() for model in models)
    return weights + (fusion.engine.kv_cache_memory_bytes or weights)


def _memory_bytes(fusion: FusionConfig) -> float:
    """What the engine may take: a share of the machine's or the container's memory."""
    share = fusion.engine.gpu_memory_utilization or EngineArgs.gpu_memory_utilization
    return share * get_memory_node_info().total_memory
