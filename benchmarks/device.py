"""The device that is measured: its memory, what a large copy reaches there, what it does in a step.

On a machine without a GPU the processor takes its place, and memory is not looked at.
"""

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.workload import Request

if TYPE_CHECKING:
    from benchmarks.engines import StepEngine


def copy_bandwidth(num_bytes: int = 2**32) -> float:
    """Bytes a second that a large copy within the device's memory reads and writes; the median of several."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = torch.ones(num_bytes if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target, seconds = torch.empty_like(source), []
    for _ in range(12):
        wait()
        start = time.perf_counter()
        target.copy_(source)
        wait()
        seconds.append(time.perf_counter() - start)
    return 2 * len(source) / statistics.median(seconds[2:])


def total_memory() -> float:
    """Bytes of the device; 0 without a GPU."""
    return torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else 0.0


def memory_in_use() -> float:
    """Bytes of the device that are given away; what this process only keeps for later counts, too."""
    if not torch.cuda.is_available():
        return 0.0
    free, total = torch.cuda.mem_get_info()
    return total - free


def write_profile(engine: "StepEngine", requests: Sequence[Request], path: Path) -> None:
    """What the device and the host do in ten steps, by torch's profiler: the longest first."""
    from torch.profiler import ProfilerActivity, profile

    engine.start(requests)
    for _ in range(5):
        engine.step()
    has_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * has_gpu
    with profile(activities=activities) as profiler:
        for _ in range(10):
            engine.step()
        wait()
    engine.stop()
    averages = profiler.key_averages()
    keys = (["self_cuda_time_total"] if has_gpu else []) + ["self_cpu_time_total"]
    tables = [averages.table(sort_by=key, row_limit=40, max_name_column_width=70) for key in keys]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(tables), encoding="utf-8")


def wait() -> None:
    """Until the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
