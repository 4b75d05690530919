"""The page that the doctor prints: plain text, one line a fact. Knows what was found, not how."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ultrafuser.server.doctor.finding import Finding
from ultrafuser.server.doctor.ingredients import Ingredients
from ultrafuser.server.doctor.machine import Machine
from ultrafuser.server.doctor.measuring import Speed
from ultrafuser.server.doctor.needed_memory import NeededMemory, gib
from ultrafuser.server.doctor.storage import Storage

NOTHING = "nothing is missing"
_WIDTH = 12


def machine_lines(machine: Machine, versions: Mapping[str, str], caches: Mapping[str, Storage]) -> Iterator[str]:
    """What this machine is, what is installed, and what is in the caches."""
    cpu, cores, memory = machine.processor, machine.cores, machine.memory
    yield "this machine"
    yield _line("processor", f"{cpu.model}, {cpu.architecture}")
    quota = "no quota" if cores.quota is None else f"a quota of {cores.quota:g}"
    yield _line("cores", f"{cores.usable} of {cores.total} usable, {quota}")
    lacking = f"; not {', '.join(cpu.lacking)}" if cpu.lacking else ""
    yield _line("flags", f"{', '.join(cpu.flags) or 'none that matter'}{lacking}")
    yield _line("", cpu.meaning)
    limit = "" if memory.limit is None else f", the container's limit is {gib(memory.limit)}"
    yield _line("memory", f"{gib(memory.total)}, {gib(memory.available)} available{limit}")
    yield _line("NUMA nodes", "not told" if machine.num_numa_nodes is None else str(machine.num_numa_nodes))
    if not machine.gpus:
        yield _line("GPUs", "none that torch sees")
    for gpu in machine.gpus:
        yield _line("GPU", f"{gpu.name}, {gib(gpu.memory)}, compute capability {gpu.capability}")
    soft, hard = (f"{number:,}" if number >= 0 else "no limit" for number in machine.open_files)
    yield _line("open files", f"{soft}, at most {hard}")
    yield _line("versions", ", ".join(f"{name} {number}" for name, number in versions.items()))
    for name, storage in caches.items():
        used = "not there yet" if storage.bytes is None else gib(storage.bytes)
        yield _line(name, f"{storage.path}: {used}, {gib(storage.free_bytes)} free on its disk")


def fusion_lines(name: str, place: str, ingredients: Ingredients | None, needed: NeededMemory | None) -> Iterator[str]:
    """What the fusion is made of, and the memory that it needs."""
    yield f"the fusion {name}, {place}"
    if ingredients is None:
        yield _line("file", "does not load")
        return
    for one in ingredients.specialists:
        size = "" if one.shape is None else f", {one.shape.num_parameters / 1e6:,.1f} M parameters"
        adapter = f" with the adapter {Path(one.adapter).name}" if one.adapter else ""
        yield _line(one.name, f"{one.model}{adapter}{size}: {one.state}")
    yield _line("gate", ingredients.gate)
    if ingredients.to_prepare:
        yield _line("first start", f"{', '.join(ingredients.to_prepare)}: {gib(ingredients.prepared_bytes)}")
    if needed is None:
        yield _line("memory", "not known before its models are here")
        return
    yield _line("weights", f"{gib(needed.weight_bytes)} in {', '.join(dict.fromkeys(needed.dtypes))}")
    yield _line("cache", f"{gib(needed.kv_bytes)}: {needed.kv_tokens:,} tokens of {needed.kv_bytes_per_token:,} bytes")
    where = f" of {needed.num_devices} GPU{'s' * (needed.num_devices > 1)}" if needed.on_gpu else ""
    both = needed.weight_bytes + needed.kv_bytes
    yield _line("", f"together {gib(both)}, of the {gib(needed.memory_bytes)}{where} that it may take")
    yield _line("context", f"{ingredients.max_model_len:,} tokens")


def speed_lines(speeds: Sequence[Speed]) -> Iterator[str]:
    """How fast it is served here."""
    yield "speed, measured now"
    for one in speeds:
        first = f"first token after {1e3 * one.first_token_seconds:,.0f} ms"
        rate = f"{one.tokens_per_second:,.1f} tokens/s, {first}, {one.num_tokens} tokens in {one.num_steps} steps"
        yield _line(f"batch {one.batch}", rate)
        parts = (f"{part} {1e3 * seconds:,.2f}" for part, seconds in one.part_seconds.items())
        yield _line("", f"mean ms: {', '.join(parts)}")


def what_to_do(findings: Sequence[Finding], serve: str) -> Iterator[str]:
    """The last lines."""
    yield "what to do"
    if not findings:
        yield f"  {NOTHING}: {serve}"
    for number, finding in enumerate(findings, start=1):
        yield f"  {number}. {finding.what}"
        yield f"     {finding.way_out}"


def _line(label: str, text: str) -> str:
    return f"  {label:<{_WIDTH}} {text}"
