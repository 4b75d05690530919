"""vLLM's Ray executor for fused models: on nodes without a GPU, too, and with a sign of life from every rank.

A rank is a Ray actor. vLLM sends it the configuration of the node that the server is on; here it puts its own node's
paths in their place. Each rank keeps a connection to the engine core: Ray takes up to a minute to tell that a node is
gone, the kernel tells at once that a process is. Knows processes and nodes, not what is computed.
"""

import logging
import os
import secrets
import socket
import threading
import time
import weakref
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import ray
import torch
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from torch.distributed import TCPStore
from vllm import envs
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.utils.cpu_resource_utils import parse_id_list
from vllm.utils.network_utils import get_distributed_init_method
from vllm.v1.executor import ray_executor_v2
from vllm.v1.executor.ray_executor_v2 import RayExecutorV2, RayWorkerProc

from ultrafuser.server.engine.core.split_executor import shares_of_cores
from ultrafuser.server.engine.shared.interfaces import network_environment
from ultrafuser.server.engine.shared.ray_cluster import PLACEMENT_KEY, RayPlacement, connect, device_key
from ultrafuser.server.engine.shared.spec import EngineSpec
from ultrafuser.server.engine.shared.wire import Wire

RESERVE_SECONDS = 60.0
"""How long devices that were free a moment ago may take to be reserved."""

WATCH_SECONDS = 0.5
"""How often it is looked whether all ranks live."""

_HELLO_SECONDS = 10.0

logger = logging.getLogger(f"vllm.{__name__}")  # below vLLM's, which alone is written in these processes


class RayRank(RayWorkerProc):
    """A rank on a node of the cluster."""

    def __init__(self, vllm_config: VllmConfig, rank: int, **kwargs: Any) -> None:
        """As vLLM's, with the paths that the models have on this node."""
        self._placement = RayPlacement.from_vllm_config(vllm_config)
        self._number = rank
        use_own_paths(vllm_config, self._placement.specs[_own_node_id()])
        super().__init__(vllm_config=vllm_config, rank=rank, **kwargs)

    def get_node_and_physical_gpu_ids(self) -> tuple[str, list[int]]:
        """As vLLM's; a CPU has no number."""
        if current_platform.is_cpu():
            return _own_node_id(), [self._number]
        return super().get_node_and_physical_gpu_ids()

    def create_dist_init_method(self) -> str:
        """As vLLM's, at this node's one address: torch alone would listen at all."""
        host = ray.util.get_node_ip_address()
        with socket.create_server((host, 0)) as listener:
            self._dist_init_store = TCPStore(
                host,
                listener.getsockname()[1],
                world_size=self._parallel_config.world_size,
                is_master=True,
                wait_for_workers=False,
                multi_tenant=True,
                master_listen_fd=os.dup(listener.fileno()),
            )
        return get_distributed_init_method(host, self._dist_init_store.port)

    def initialize_worker(
        self,
        local_rank: int,
        env_vars: dict[str, str],
        distributed_init_method: str,
        driver_env_vars: dict[str, str] | None = None,
        assigned_physical_gpu_ids: list[int] | None = None,
    ) -> None:
        """As vLLM's, on this node's interface and its share of the cores, tied to the engine core."""
        os.environ.update(network_environment(os.environ, ray.util.get_node_ip_address()))
        self._tie()
        if current_platform.is_cpu():
            _take_cores(len(assigned_physical_gpu_ids or [0]), local_rank)
        else:
            # By this word vLLM's GPU worker knows that a rank has one of the node's devices, and not all of them.
            self._parallel_config.distributed_executor_backend = "ray"
        # vLLM takes ranks whose method ends alike for processes of one machine, that share memory.
        own_method = f"{distributed_init_method}?node={_own_node_id()}"
        super().initialize_worker(local_rank, env_vars, own_method, driver_env_vars, assigned_physical_gpu_ids)

    def _tie(self) -> None:
        assert self._placement.meeting_point is not None
        wire = Wire(socket.create_connection(self._placement.meeting_point, timeout=_HELLO_SECONDS))
        wire.send(rank=self._number, token=self._placement.token)

        def end_with_the_engine_core() -> None:
            wire.receive()
            os._exit(1)

        threading.Thread(target=end_with_the_engine_core, name="EngineCore", daemon=True).start()


class RayExecutor(RayExecutorV2):
    """Starts a rank on each device that the placement names; the first one answers for all."""

    is_ending = False
    """Whether ranks may end."""

    _wires: Mapping[int, Wire] = {}
    _reserved: PlacementGroup | None = None

    def _init_executor(self) -> None:
        placement = RayPlacement.from_vllm_config(self.vllm_config)
        connect(placement.address, tells_workers_output=True)
        self._reserved = _reserve(placement)
        self.parallel_config.placement_group = self._reserved
        self._listener = socket.create_server((ray.util.get_node_ip_address(), 0))
        self._token = secrets.token_hex(16)
        update = {"meeting_point": self._listener.getsockname()[:2], "token": self._token}
        placement.model_copy(update=update).put_into(self.vllm_config)
        try:
            super()._init_executor()
        except BaseException:
            self.shutdown()  # at once: ranks that wait for one that failed heed nothing
            raise

    def _get_parallel_sizes(self) -> tuple[int, int, int]:
        super()._get_parallel_sizes()
        return self.world_size, 1, 1

    def _get_output_rank(self) -> int:
        return 0

    def start_worker_monitor(self, inline: bool = False) -> None:
        """As vLLM's, which would notice that a node is gone when Ray does, and join slowly at the end."""
        with self._listener:
            self._wires = _meet_ranks(self._listener, self._token, self.world_size)
        self._monitor_thread = threading.Thread(target=_watch, args=(weakref.ref(self),), name="RayRanks", daemon=True)
        self._monitor_thread.start()

    def dead_ranks(self) -> list[int]:
        """Ranks whose process, or node, is gone; none before all have come."""
        if not self._wires or not ray.is_initialized():  # to ask would connect to the cluster anew
            return []
        gone = {rank for rank, wire in self._wires.items() if not wire.is_open}
        ranks = {handle.run_ref: handle.rank for handle in self.ray_worker_handles}
        with suppress(ray.exceptions.RayError):  # of a cluster that is gone itself
            ended, _ = ray.wait(list(ranks), num_returns=len(ranks), timeout=0)
            gone |= {ranks[reference] for reference in ended}
        return sorted(gone)

    def end_all(self) -> None:
        """A rank is gone: end the others, and let the engine core know."""
        self.is_failed = True
        self.shutdown()
        if (tell := self.failure_callback) is not None:
            self.failure_callback: Any = None
            tell()

    def shutdown(self) -> None:
        """As vLLM's; the ranks end by themselves when their connection does, and the devices are given back."""
        if not self.is_ending:
            self._name_the_dead()
        self.is_ending = True
        for wire in self._wires.values():
            wire.close()
        if not ray.is_initialized():  # at Python's end; to kill a rank would connect to the cluster anew
            self.ray_worker_handles: list[Any] = []
        super().shutdown()
        reserved, self._reserved = self._reserved, None
        if reserved is not None and ray.is_initialized():
            remove_placement_group(reserved)

    def _name_the_dead(self) -> None:
        """Whoever notices an end first: it may also be a rank that was talking to the dead one."""
        for rank in self.dead_ranks():
            address = self._wires[rank].address
            logger.error("rank %d (%s) of the Ray cluster is gone; the engine ends on all nodes", rank, address)


ray_executor_v2.RayWorkerProc = RayRank
# All of the server's variables would go to other machines, keys among them; `connect` says which go.
ray_executor_v2.get_driver_env_vars = lambda worker_specific_vars: {}


def use_own_paths(config: VllmConfig, spec: EngineSpec) -> None:
    """Put a node's own names of models and gate into a configuration that was made on another one."""
    model = config.model_config
    own = spec.specialists[0].model
    if model.tokenizer == model.model:
        model.tokenizer = own
    model.model = own
    # Without the placement, which is another at every start: vLLM names its compiled models by all that is here.
    kept = {name: value for name, value in config.additional_config.items() if name != PLACEMENT_KEY}
    config.additional_config = kept | spec.to_additional_config()


def _own_node_id() -> str:
    node_id: str = ray.get_runtime_context().get_node_id()
    return node_id


def _take_cores(num_ranks: int, index: int) -> None:
    """This rank's share of the node's cores; Ray would leave it one thread, and vLLM's other executor has chosen here.

    Variables would come too late: torch is imported.
    """
    bind = envs.VLLM_CPU_OMP_THREADS_BIND
    if bind == "nobind":
        return
    shares = shares_of_cores(num_ranks) if bind == "auto" else bind
    cores = parse_id_list(shares.split("|")[index])
    if num_ranks > 1 or bind != "auto":
        os.sched_setaffinity(0, cores)
    torch.set_num_threads(len(cores))


def _reserve(placement: RayPlacement) -> PlacementGroup:
    """The devices of the placement's nodes, which were free when the nodes met.

    Raises:
        RuntimeError: they are taken.
    """
    group = placement_group(
        [{device_key(): 1.0} for _ in placement.node_ids],
        strategy="PACK",
        bundle_label_selector=[{"ray.io/node-id": node_id} for node_id in placement.node_ids],
    )
    if not group.wait(RESERVE_SECONDS):
        remove_placement_group(group)
        raise RuntimeError("the Ray cluster's devices were taken by somebody else meanwhile; start again")
    return group


def _meet_ranks(listener: socket.socket, token: str, num_ranks: int) -> dict[int, Wire]:
    """The connections that all ranks have opened before they were ready."""
    wires: dict[int, Wire] = {}
    listener.settimeout(_HELLO_SECONDS)
    while len(wires) < num_ranks:
        connection, _ = listener.accept()
        try:
            wire = Wire(connection)
        except OSError:  # somebody who has left again
            connection.close()
            continue
        hello = wire.receive(_HELLO_SECONDS) or {}
        if hello.get("token") == token:
            wires[int(hello["rank"])] = wire
        else:
            wire.close()
    return wires


def _watch(own: "weakref.ref[RayExecutor]") -> None:
    while (executor := own()) is not None and not executor.is_ending:
        if executor.dead_ranks() and not executor.is_ending:
            return executor.end_all()
        del executor
        time.sleep(WATCH_SECONDS)
    return None
