"""A Ray cluster that runs an engine's ranks: its nodes, what is free on them, and which rank goes onto which.

Ray is no part of an installation: importing this module does not import it. Knows no models.
"""

import logging
import os
import signal
import socket
import threading
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from pydantic import BaseModel, ConfigDict
from vllm.config import VllmConfig
from vllm.platforms import current_platform

from ultrafuser.gating.model.fusion import FusionConfig
from ultrafuser.server.engine.shared.options import EngineOptionError
from ultrafuser.server.engine.shared.spec import EngineSpec

CPU_RESOURCE = "fused_rank"
"""The resource by which ranks are put onto nodes without a GPU: how many of it a node has is said at its start."""

_OPTION = "distributed_executor_backend: ray"
PLACEMENT_KEY = "ultrafuser_ray"
"""Our key in `VllmConfig.additional_config` for the placement."""

_CONNECT_SECONDS = 5.0
# Of this process's variables those that tell the engine's processes how to compute, and what to say. No other crosses
# the network: among them may be keys.
_CARRIED = ("VLLM_", "TORCH_", "PYTORCH_", "NCCL_", "GLOO_", "PYTHONWARNINGS", "PYTHONHASHSEED")
_PATH_ENDINGS = ("_PATH", "_DIR", "_ROOT", "_FOLDER", "_FILE", "_HOME")
"""Of variables that name a place on one machine."""

_OF_ONE_MACHINE = frozenset(
    {
        "VLLM_API_KEY",
        "VLLM_CPU_OMP_THREADS_BIND",
        "VLLM_HOST_IP",
        "GLOO_SOCKET_IFNAME",
        "NCCL_SOCKET_IFNAME",
    }
)


class RayPlacement(BaseModel):
    """Which node of a cluster has which ranks, and what each node calls the models: in vLLM's `additional_config`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    address: str
    """Of the cluster: host and port of what Ray calls its GCS."""

    node_ids: tuple[str, ...]
    """The node of each rank."""

    specs: dict[str, EngineSpec]
    """What the workers of each node are told of the fused model: its own paths."""

    meeting_point: tuple[str, int] | None = None
    """Where the ranks' connections to the engine core go; set by the engine core."""

    token: str = ""
    """What they say there."""

    @classmethod
    def from_vllm_config(cls, vllm_config: VllmConfig) -> "RayPlacement":
        """The placement that `put_into` put there."""
        config: Any = vllm_config.additional_config
        return cls.model_validate(config[PLACEMENT_KEY])

    def put_into(self, vllm_config: VllmConfig) -> None:
        """Let vLLM carry this placement to engine core and workers."""
        config: Any = vllm_config.additional_config
        config[PLACEMENT_KEY] = self.model_dump(mode="json")


@dataclass(frozen=True)
class RayNode:
    """A living node of the cluster."""

    id: str
    """Ray's, unique."""

    address: str
    """Its address on the cluster's network; nodes on one machine may share one."""

    free: int
    """Devices that nobody has taken."""

    total: int
    """All its devices."""


def check_ray(fusion: FusionConfig) -> bool:
    """Whether the engine's ranks go onto a Ray cluster.

    Raises:
        EngineOptionError: they should, and Ray is not installed.
    """
    if fusion.engine.distributed_executor_backend != "ray":
        return False
    if find_spec("ray") is None:
        raise EngineOptionError(f"{_OPTION}: Ray is not installed; pip install 'ultrafuser[ray]' on every node")
    return True


def connect(address: str | None, tells_workers_output: bool) -> None:
    """Make this process one of a cluster's drivers; signals stay with whoever handles them now.

    `address` is a host and a port; None: that of the cluster this machine is a node of.

    Raises:
        EngineOptionError: there is no such cluster, or this machine is none of its nodes.
    """
    if address is not None and "://" in address:
        raise EngineOptionError(f"RAY_ADDRESS: {address} is a Ray client's; run the server on a node, and unset it")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    import ray
    from ray._private.services import canonicalize_bootstrap_address

    try:
        address = canonicalize_bootstrap_address(address or "auto")
        if address is None:
            raise ConnectionError("none runs on this machine")
        host, _, port = address.rpartition(":")
        # Ray itself would try for minutes.
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
        ray.init(
            address=address,
            runtime_env={"env_vars": carried_variables(os.environ)},
            log_to_driver=tells_workers_output,
            logging_level=logging.WARNING,
        )
    except (OSError, RuntimeError, ValueError, AssertionError) as error:
        where = f"at {address}" if address else "here"
        reason = " ".join(str(error).split())[:300]
        raise EngineOptionError(
            f"{_OPTION}: no Ray cluster can be used {where} ({reason}); run `ray start` on this machine first, "
            "with the same versions of Ray and Python as on the others"
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)


def carried_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Those of the server's variables that hold on all nodes."""
    return {
        name: value
        for name, value in environ.items()
        if name.startswith(_CARRIED) and name not in _OF_ONE_MACHINE and not name.endswith(_PATH_ENDINGS)
    }


def device_key() -> str:
    """What Ray calls the resource that each rank takes one of; vLLM has none for CPUs."""
    if current_platform.is_cpu():
        current_platform.ray_device_key = CPU_RESOURCE
    key: str = current_platform.ray_device_key
    return key


def cluster_nodes() -> list[RayNode]:
    """The living nodes that have devices, in the order in which vLLM hands them ranks: this machine's first."""
    import ray
    from vllm.v1.executor.ray_utils import available_resources_per_node

    key, free = device_key(), available_resources_per_node()
    found = [
        RayNode(
            node["NodeID"],
            node["NodeManagerAddress"],
            int(free.get(node["NodeID"], {}).get(key, 0)),
            int(node["Resources"].get(key, 0)),
        )
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get(key, 0) >= 1
    ]
    own = ray.get_runtime_context().get_node_id()
    return sorted(found, key=lambda node: (node.id != own, node.id))


def place(num_ranks: int, nodes: Sequence[RayNode], own: str) -> tuple[str, ...] | None:
    """The node of each rank: this machine (the node `own`), then as few others as can be; None: too little is free."""
    chosen: Counter[str] = Counter()
    for node in sorted(nodes, key=lambda node: (node.id != own, -node.free, node.id)):
        chosen[node.id] = min(node.free, num_ranks - chosen.total())
    if chosen.total() < num_ranks:
        return None
    return tuple(node.id for node in nodes for _ in range(chosen[node.id]))


def names_of(nodes: Collection[RayNode]) -> dict[str, str]:
    """What people call each node: its address, with the beginning of its id where several share one."""
    shared = Counter(node.address for node in nodes)
    return {node.id: node.address if shared[node.address] == 1 else f"{node.address} ({node.id[:8]})" for node in nodes}
