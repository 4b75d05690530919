"""The worker for the CPU, alone in its module: to import vLLM's replaces functions of torch for the whole process.

Events, streams, synchronisation, memory and pinning of every accelerator become dummies, so only a worker that runs on
the CPU may import this module; the engine's options name it where the platform is one.
"""

from vllm.v1.worker.cpu_worker import CPUWorker

from ultrafuser.server.engine.worker.worker import FusedWorkerMixin


class FusedCPUWorker(FusedWorkerMixin, CPUWorker):
    """n specialists on the CPU."""
