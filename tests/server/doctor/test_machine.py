"""What Linux tells of a machine, out of its files as machines of other kinds have them."""

import os
from pathlib import Path

import pytest

from ultrafuser.server.doctor.machine import (
    count_numa_nodes,
    look,
    read_cores,
    read_memory,
    read_processor,
)

GIB = 2**30
X86 = "processor\t: 0\nmodel name\t: Made-up CPU\nflags\t\t: fpu avx2 {}\n\nprocessor\t: 1\nmodel name\t: Made-up CPU\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine of 16 GiB, of which 8 are available, without control groups."""
    write(tmp_path, "proc/meminfo", f"MemTotal: {16 * 2**20} kB\nMemFree: 1 kB\nMemAvailable: {8 * 2**20} kB\n")
    return tmp_path


def write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


@pytest.mark.parametrize(
    ("flags", "meaning"),
    [
        ("avx512f avx512_bf16", "by instructions of its own (avx512_bf16)"),
        ("avx512f avx512_bf16 amx_bf16", "by instructions of its own (amx_bf16, avx512_bf16)"),
        ("avx512f", "with AVX-512, without instructions"),
        ("", "without AVX-512 bfloat16 is emulated"),
    ],
)
def test_the_flags_of_a_processor_say_how_bfloat16_is_computed(root: Path, flags: str, meaning: str) -> None:
    write(root, "proc/cpuinfo", X86.format(flags))
    processor = read_processor(root, "x86_64")
    assert processor.model == "Made-up CPU"
    assert processor.flags == ("avx2", *flags.split())
    assert {*processor.flags, *processor.lacking} == {"avx2", "avx512f", "avx512_bf16", "amx_bf16"}
    assert meaning in processor.meaning


@pytest.mark.parametrize(
    ("features", "meaning"),
    [("asimd bf16", "of its own (bf16)"), ("asimd", "without instructions for it bfloat16 is emulated")],
)
def test_arm_names_no_model_and_calls_its_flags_features(root: Path, features: str, meaning: str) -> None:
    write(root, "proc/cpuinfo", f"processor\t: 0\nFeatures\t: fp {features}\n")
    processor = read_processor(root, "aarch64")
    assert processor.model == "unnamed aarch64 processor"
    assert processor.flags == tuple(features.split())
    assert meaning in processor.meaning


def test_without_control_groups_the_memory_is_the_machines(root: Path) -> None:
    memory = read_memory(root)
    assert (memory.total, memory.available, memory.limit, memory.usable) == (16 * GIB, 8 * GIB, None, 16 * GIB)


@pytest.mark.parametrize(
    ("cgroup", "folder", "files"),
    [
        ("0::/pod/own\n", "", {"memory.max": 4 * GIB, "memory.current": 3 * GIB}),
        ("0::/pod/own\n", "pod/own", {"memory.max": 4 * GIB, "memory.current": 3 * GIB}),
        ("0::/pod/own\n", "pod", {"memory.max": 4 * GIB, "memory.current": 3 * GIB}),
        (
            "9:name=systemd:/\n4:memory:/own\n0::/\n",
            "memory/own",
            {"memory.limit_in_bytes": 4 * GIB, "memory.usage_in_bytes": 3 * GIB},
        ),
    ],
    ids=["v2 as a container sees it", "v2", "v2, a limit above", "v1"],
)
def test_the_containers_limit_counts_wherever_it_is_set(
    root: Path, cgroup: str, folder: str, files: dict[str, int]
) -> None:
    write(root, "proc/self/cgroup", cgroup)
    for name, number in files.items():
        write(root, f"sys/fs/cgroup/{folder}/{name}", f"{number}\n")
    memory = read_memory(root)
    assert (memory.total, memory.available, memory.limit, memory.usable) == (16 * GIB, GIB, 4 * GIB, 4 * GIB)


@pytest.mark.parametrize(
    ("cgroup", "path", "text"),
    [
        ("0::/\n", "memory.max", "max"),
        ("4:memory:/\n", "memory/memory.limit_in_bytes", str(2**63 - 4096)),
        ("4:cpu:/own\n", "memory/own/memory.limit_in_bytes", str(GIB)),
    ],
    ids=["v2", "v1", "of another controller's group"],
)
def test_a_group_without_a_limit_has_none(root: Path, cgroup: str, path: str, text: str) -> None:
    write(root, "proc/self/cgroup", cgroup)
    write(root, f"sys/fs/cgroup/{path}", f"{text}\n")
    assert read_memory(root).limit is None


@pytest.mark.parametrize(
    ("cgroup", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/own\n", {"cpu.max": "max 100000\n", "own/cpu.max": "200000 100000\n"}, 2.0),
        ("0::/own\n", {"cpu.max": "50000 100000\n", "own/cpu.max": "200000 100000\n"}, 0.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("1:cpu,cpuacct:/\n", {"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3.0),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
    ],
)
def test_a_quota_is_told_in_cores(root: Path, cgroup: str, files: dict[str, str], quota: float | None) -> None:
    write(root, "proc/self/cgroup", cgroup)
    for name, text in files.items():
        write(root, f"sys/fs/cgroup/{name}", text)
    assert read_cores(root).quota == quota


@pytest.mark.parametrize(("online", "number"), [("0\n", 1), ("0-3\n", 4), ("0,2-3\n", 3)])
def test_numa_nodes_are_counted(root: Path, online: str, number: int) -> None:
    write(root, "sys/devices/system/node/online", online)
    assert count_numa_nodes(root) == number


def test_a_kernel_without_numa_tells_of_no_nodes(root: Path) -> None:
    assert count_numa_nodes(root) is None


def test_this_machine_can_be_looked_at() -> None:
    machine = look(())
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert machine.memory.total == pytest.approx(pages, rel=0.01)
    assert 0 < machine.memory.available <= machine.memory.total
    assert machine.cores.usable == len(os.sched_getaffinity(0))
    assert machine.processor.model in Path("/proc/cpuinfo").read_text()
