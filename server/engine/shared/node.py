"""One engine over several machines ("nodes"): which of them this is, and whether the engine's ranks go onto them.

Each node makes vLLM's configuration of its own models; nodes differ in nothing else than paths. Starts nothing.
"""

from dataclasses import dataclass

from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext

from ultrafuser.gating.model.fusion import FusionConfig
from ultrafuser.server.engine.shared.options import EngineOptionError
from ultrafuser.server.engine.shared.ray_cluster import RayPlacement
from ultrafuser.server.engine.shared.spec import EngineSpec


@dataclass(frozen=True)
class Node:
    """One of the machines that run an engine together. Node 0 has the scheduler; all have workers."""

    rank: int
    """0 to `num_nodes` - 1."""

    num_nodes: int
    """At least 2."""

    master_addr: str
    """Address of node 0."""

    master_port: int
    """Port of node 0 at which torch's processes meet."""


def num_ranks(fusion: FusionConfig) -> int:
    """How many ranks, each with a device, all nodes together have."""
    is_split = fusion.engine.placement == "split"
    return (fusion.engine.tensor_parallel_size or 1) * (len(fusion.specialists) if is_split else 1)


def check_node(fusion: FusionConfig, node: Node) -> None:
    """Refuse what would hang, or fail in the workers.

    Raises:
        EngineOptionError: naming the option, and the way out.
    """
    backend = fusion.engine.distributed_executor_backend
    if backend not in (None, "mp"):
        raise EngineOptionError(
            f"distributed_executor_backend: {backend} does not go with --nnodes; leave one of them out"
        )
    ranks = num_ranks(fusion)
    if ranks % node.num_nodes:
        raise EngineOptionError(
            f"--nnodes: {ranks} ranks (tensor_parallel_size, times the specialists with placement: split) do not "
            f"divide over {node.num_nodes} machines; change tensor_parallel_size, or the number of machines"
        )
    own, num_devices = ranks // node.num_nodes, current_platform.device_count()
    if own != num_devices:  # vLLM takes ranks for neighbours by the number of devices it sees
        way_out = (
            f"use {ranks} machines, since a CPU counts as one device"
            if current_platform.is_cpu()
            else "make exactly so many visible, by CUDA_VISIBLE_DEVICES"
        )
        raise EngineOptionError(
            f"--nnodes: each machine gets {own} of {ranks} ranks, but here are {num_devices} devices; {way_out}"
        )


def engine_config(args: AsyncEngineArgs, node: Node | RayPlacement | None) -> VllmConfig:
    """vLLM's configuration, of this node's share where there are several.

    Nodes are told to it afterwards: it would count the ranks of one specialist only, and take no executor but its own.
    """
    if node is None:
        return args.create_engine_config(UsageContext.OPENAI_API_SERVER)
    config = args.create_engine_config(UsageContext.OPENAI_API_SERVER)
    spec, parallel = EngineSpec.from_vllm_config(config), config.parallel_config
    if spec.exchange is not None:
        parallel.world_size = len(spec.specialists) * parallel.tensor_parallel_size
    if isinstance(node, RayPlacement):
        node.put_into(config)
        return config
    parallel.nnodes, parallel.node_rank = node.num_nodes, node.rank
    parallel.master_addr, parallel.master_port = node.master_addr, node.master_port
    return config
