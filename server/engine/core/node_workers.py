"""The workers of a node other than the first: they obey the engine core on node 0, over the network.

Knows vLLM's executor; who watches over the nodes, and what ends them, is its caller's business.
"""

from collections.abc import Mapping
from typing import Any

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.executor import Executor
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from ultrafuser.gating.model.fusion import FusionConfig, inspect_fusion
from ultrafuser.server.engine.shared.node import Node, engine_config
from ultrafuser.server.engine.shared.options import engine_arguments


class NodeWorkers:
    """This node's worker processes, with their models loaded."""

    def __init__(self, fusion: FusionConfig, engine_options: Mapping[str, Any], node: Node) -> None:
        """Start them; blocks until all nodes' workers have met and these are ready.

        Raises:
            Whatever `engine_arguments` raises; RuntimeError: a worker has failed, and said why.
        """
        args = AsyncEngineArgs(**engine_arguments(fusion, inspect_fusion(fusion), engine_options))
        config = engine_config(args, node)
        executor_class: type[MultiprocExecutor] = Executor.get_class(config)
        self._executor = executor_class(config, monitor_workers=False)

    def wait(self) -> None:
        """Return when one of them has ended; the others have ended then, too."""
        self._executor.start_worker_monitor(inline=True)

    def shutdown(self) -> None:
        """End them, within seconds."""
        self._executor.shutdown()
