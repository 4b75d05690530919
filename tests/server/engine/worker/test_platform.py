"""The worker is the platform's, and what is imported for one platform leaves the others' functions alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname

from tests.server.engine.harness import InProcessEngine
from ultrafuser.server.engine.shared.options import CPU_WORKER, GPU_WORKER

ON_ANOTHER_PLATFORM = """
import json, pkgutil, sys
from pathlib import Path

import torch
import vllm.platforms
from vllm.platforms.interface import UnspecifiedPlatform

NAMES = [
    "Event", "cuda.Event", "cuda.Stream", "cuda.set_stream", "cuda.current_stream", "cuda.stream", "cuda.synchronize",
    "accelerator.synchronize", "accelerator.empty_cache", "accelerator.get_memory_info", "accelerator.current_stream",
    "Tensor.pin_memory", "Tensor.record_stream",
]


def functions():
    found = {}
    for name in NAMES:
        found[name] = torch
        for part in name.split("."):
            found[name] = getattr(found[name], part)
    return found


vllm.platforms._current_platform = UnspecifiedPlatform()
UnspecifiedPlatform.import_kernels = classmethod(lambda cls: None)  # they may need AVX-512
before = functions()
import ultrafuser.server.engine

engine = ultrafuser.server.engine
modules = [module.name for module in pkgutil.walk_packages(engine.__path__, f"{engine.__name__}.")]
for name in sorted(modules):
    if name != "ultrafuser.server.engine.worker.cpu_worker":
        try:
            __import__(name)
        except ModuleNotFoundError as error:
            if error.name != "ray":  # which only those install who use it
                raise

from ultrafuser.gating.model.fusion import inspect_fusion, load_fusion
from ultrafuser.server.engine.shared.options import engine_arguments

fusion = load_fusion(Path(sys.argv[1]))
worker = engine_arguments(fusion, inspect_fusion(fusion))["worker_cls"]
after = functions()
print(json.dumps({
    "replaced": [name for name in NAMES if before[name] is not after[name]],
    "imported": modules,
    "cpu": [name for name in sys.modules if name in ("vllm.v1.worker.cpu.shm", "vllm.v1.worker.cpu_worker")],
    "worker": worker,
}))
"""


def test_on_another_platform_torchs_functions_stay_torchs(tiny_fusion: Path) -> None:
    """vLLM's CPU worker was imported everywhere: on a GPU nothing was waited for, and the host's memory was planned."""
    command = [sys.executable, "-c", ON_ANOTHER_PLATFORM, str(tiny_fusion)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=Path(__file__).parents[4])
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["replaced"] == []
    assert found["cpu"] == []
    assert found["worker"] == GPU_WORKER
    assert {GPU_WORKER.rpartition(".")[0], CPU_WORKER.rpartition(".")[0]} <= set(found["imported"])


@pytest.mark.skipif(not current_platform.is_cpu(), reason="needs vLLM for the CPU")
def test_on_the_cpu_vllms_cpu_worker_is_used(engine: InProcessEngine) -> None:
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.cpu_worker import CPUWorker

    worker = engine.llm.engine_core.engine_core.model_executor.driver_worker.worker
    assert type(worker) is resolve_obj_by_qualname(CPU_WORKER)
    assert isinstance(worker, CPUWorker)
    assert [type(runner) for runner in engine.runner.runners] == [CPUModelRunner] * 3
