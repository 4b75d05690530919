"""What this machine is: processor, memory, limits of its container, GPUs; as Linux tells it in files.

Functions take the root of these files, which is `/` but in tests. Knows no fusion.
"""

import os
import platform
import re
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")
UNLIMITED_BYTES = 1 << 60
"""From here on a limit of memory (cgroup v1 knows numbers only) means that there is none."""

_FLAGS = {
    "x86_64": ("avx2", "avx512f", "avx512_bf16", "amx_bf16"),
    "aarch64": ("asimd", "sve", "bf16"),
}
"""Those that decide how fast the CPU multiplies, by architecture."""


@dataclass(frozen=True)
class Processor:
    """The CPU."""

    model: str
    architecture: str

    flags: tuple[str, ...]
    """Of the flags that matter, those it has."""

    lacking: tuple[str, ...]
    """Of the flags that matter, those it has not."""

    @property
    def meaning(self) -> str:
        """What the flags mean for a fused model."""
        own = {"avx512_bf16", "amx_bf16", "bf16"} & set(self.flags)
        if own:
            return f"bfloat16 is computed by instructions of its own ({', '.join(sorted(own))})"
        if "avx512f" in self.flags:
            return "bfloat16 is computed with AVX-512, without instructions of its own"
        lack = "AVX-512" if self.architecture == "x86_64" else "instructions for it"
        return f"without {lack} bfloat16 is emulated; `dtype: fastest` takes float32 where it fits"


@dataclass(frozen=True)
class Cores:
    """Logical cores: the machine's, and what this process may have of them."""

    total: int
    usable: int
    """By affinity."""

    quota: float | None
    """Cores that the container's quota amounts to; None: there is none."""


@dataclass(frozen=True)
class Memory:
    """Bytes."""

    total: int
    available: int
    """What may still be taken, by the machine and by the container."""

    limit: int | None
    """The container's; None: there is none."""

    @property
    def usable(self) -> int:
        """The machine's, or as much of it as the container may have."""
        return min(self.total, self.limit or self.total)


@dataclass(frozen=True)
class GPU:
    """One that torch sees."""

    name: str
    memory: int
    """Bytes."""

    capability: str
    """Compute capability, as "9.0"."""


@dataclass(frozen=True)
class Machine:
    """All of it."""

    processor: Processor
    cores: Cores
    memory: Memory
    num_numa_nodes: int | None
    """None: the kernel does not tell."""

    gpus: tuple[GPU, ...]
    open_files: tuple[int, int]
    """Soft and hard limit of this process; -1: none."""


def look(gpus: tuple[GPU, ...], root: Path = ROOT) -> Machine:
    """The machine, with the GPUs that torch has told of."""
    return Machine(
        read_processor(root),
        read_cores(root),
        read_memory(root),
        count_numa_nodes(root),
        gpus,
        resource.getrlimit(resource.RLIMIT_NOFILE),
    )


def seen_gpus() -> tuple[GPU, ...]:
    """The GPUs that torch sees; imports it."""
    import torch

    if not torch.cuda.is_available():
        return ()
    found = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    return tuple(GPU(one.name, one.total_memory, f"{one.major}.{one.minor}") for one in found)


def read_processor(root: Path = ROOT, architecture: str = "") -> Processor:
    """The CPU of `/proc/cpuinfo`; `architecture` is this machine's if none is named."""
    architecture = architecture or platform.machine()
    fields: dict[str, str] = {}
    for line in (root / "proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip().lower(), value.strip())
    told = set(fields.get("flags", fields.get("features", "")).split())
    matter = _FLAGS.get(architecture, ())
    return Processor(
        fields.get("model name") or f"unnamed {architecture} processor",
        architecture,
        tuple(flag for flag in matter if flag in told),
        tuple(flag for flag in matter if flag not in told),
    )


def read_cores(root: Path = ROOT) -> Cores:
    """Cores of the machine, of this process, and the container's quota."""
    quotas = [quota for folder in _cgroups(root, "cpu") if (quota := _quota(folder)) is not None]
    return Cores(os.cpu_count() or 1, len(os.sched_getaffinity(0)), min(quotas, default=None))


def read_memory(root: Path = ROOT) -> Memory:
    """Memory of `/proc/meminfo`, and what the container's limits leave of it."""
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB", (root / "proc/meminfo").read_text(encoding="utf-8"), re.MULTILINE))
    total, available = (1024 * int(fields[name]) for name in ("MemTotal", "MemAvailable"))
    limits = []
    for folder in _cgroups(root, "memory"):
        limit = _first(folder, ("memory.max", "memory.limit_in_bytes"), _whole)
        if limit is not None and limit < UNLIMITED_BYTES:
            used = _first(folder, ("memory.current", "memory.usage_in_bytes"), _whole) or 0
            limits.append(limit)
            available = min(available, max(0, limit - used))
    return Memory(total, available, min(limits, default=None))


def count_numa_nodes(root: Path = ROOT) -> int | None:
    """Nodes that are online, of a list such as `0-1,3`."""
    try:
        text = (root / "sys/devices/system/node/online").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    ranges = (part.split("-") for part in text.split(","))
    return sum(int(ends[-1]) - int(ends[0]) + 1 for ends in ranges)


def _cgroups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process' control groups, v2 and v1, from its own to the outermost: each one's limits hold.

    In a container the own folder may be mounted as the outermost.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    top = root / "sys/fs/cgroup"
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            bases = [top, top / "unified"]
        elif controller in controllers.split(","):
            bases = [top / controllers, top / controller]
        else:
            continue
        own = path.strip("/")
        for base in bases:
            folder = base / own
            yield from (place for place in (folder, *folder.parents) if place.is_relative_to(base) and place.is_dir())


def _quota(folder: Path) -> float | None:
    """Cores of a control group, of v2's `cpu.max` or v1's two files."""
    try:
        if (both := folder / "cpu.max").is_file():
            quota, period = both.read_text(encoding="utf-8").split()
        else:
            quota, period = (
                (folder / f"cpu.cfs_{name}_us").read_text(encoding="utf-8").strip() for name in ("quota", "period")
            )
    except OSError:
        return None
    return None if quota in ("max", "-1") else int(quota) / int(period)


def _first(folder: Path, names: tuple[str, ...], read: Callable[[str], int | None]) -> int | None:
    """What the first of these files says that is there."""
    for name in names:
        try:
            return read((folder / name).read_text(encoding="utf-8").strip())
        except OSError:
            continue
    return None


def _whole(text: str) -> int | None:
    return None if text == "max" else int(text)
