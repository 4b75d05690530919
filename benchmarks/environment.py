"""Where a result was measured: hardware, versions, commit, command, load. No names of machines or people."""

import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.measure import Frozen
from ultrafuser import __version__

REPOSITORY = Path(__file__).resolve().parent.parent
SETTINGS_THAT_MATTER = (
    "VLLM_CPU_OMP_THREADS_BIND",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "VLLM_USE_SPINLOOP_EXT",
    "VLLM_USE_FLASHINFER_SAMPLER",
    "TRITON_F32_DEFAULT",
)


class Environment(Frozen):
    """Everything that a number depends on apart from the benchmark itself."""

    hardware: str
    """Processor, cores this process may use, memory, GPUs."""

    versions: dict[str, str]
    """Python and the packages that do the work."""

    commit: str
    """Commit of the repository; "+changes" if tracked files differed from it."""

    command: str
    """What was typed."""

    settings: dict[str, str]
    """Environment variables that change speed, if they were set."""

    load: float
    """Processes that wanted to run in the minute before the start: above 1 the machine was not idle."""


def describe_environment(module: str, argv: Sequence[str]) -> Environment:
    """The environment at the start of `python -m MODULE ARGV`."""
    return Environment(
        hardware=_hardware(),
        versions={"ultrafuser": __version__, "python": platform.python_version(), **_package_versions()},
        commit=_commit(),
        command=shlex.join(["python", "-m", module, *argv]),
        settings={name: os.environ[name] for name in SETTINGS_THAT_MATTER if name in os.environ},
        load=round(os.getloadavg()[0], 2),
    )


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _hardware() -> str:
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    parts = [_processor(), f"{num_cores()} cores", f"{gib:.0f} GiB", *_gpus()]
    return ", ".join(parts)


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _gpus() -> list[str]:
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    gpus = [line.split(", ") for line in output.splitlines()]
    return [f"GPU {name} (driver {driver})" for name, driver in gpus]


def _package_versions() -> dict[str, str]:
    versions = {}
    for name in ("vllm", "vllm-cpu", "torch", "triton", "transformers"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def _commit() -> str:
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        has_changes = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results", ":!docs")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return commit + ("+changes" if has_changes else "")


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(REPOSITORY), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
