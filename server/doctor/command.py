"""What this machine is, and what a fusion lacks here: `ultrafuser doctor`. See docs/operations.md.

Puts the parts of `server/doctor/` together. Does not import vLLM; `--measure` starts a process that does.
"""

import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from ultrafuser.gating.commands.fields import CacheFolder, CommandSettings
from ultrafuser.gating.commands.flags import parse_command
from ultrafuser.gating.errors import FusionError
from ultrafuser.gating.model.cache import cache_folder
from ultrafuser.gating.model.fusion import FusionConfig, find_fusion, load_fusion
from ultrafuser.server.doctor.finding import Finding
from ultrafuser.server.doctor.ingredients import Ingredients, look_into
from ultrafuser.server.doctor.machine import Machine, look, seen_gpus
from ultrafuser.server.doctor.measuring import MeasuringError, Speed, measure
from ultrafuser.server.doctor.needed_memory import NeededMemory, gib, memory_findings, needed_memory
from ultrafuser.server.doctor.packages import engine_extra, missing_packages
from ultrafuser.server.doctor.sheet import fusion_lines, machine_lines, speed_lines, what_to_do
from ultrafuser.server.doctor.storage import Storage, look_at
from ultrafuser.server.start.installed import installed_versions


class DoctorSettings(CommandSettings):
    """One look."""

    fusion: str = "demo"
    """The fusion file (YAML), a folder with a fusion.yaml, or a preset: demo, ultrafuser-13b, qwen2.5-7b."""

    measure: bool = False
    """Start the engine, generate a little, and say how fast it was."""

    as_json: Annotated[bool, Field(alias="json")] = False
    """Print everything as one JSON object."""

    cache: CacheFolder = None


parse_settings = partial(
    parse_command,
    DoctorSettings,
    prog="ultrafuser doctor",
    usage="[FUSION] [--measure] [--json]",
    description="Say what this machine is, whether a fusion can be served here, and what gets what is missing.",
    positional="fusion",
)
"""Reads the command line of `ultrafuser doctor`, as `parse_command` does."""


@dataclass(frozen=True)
class Diagnosis:
    """Everything that was found, by the names of the JSON object."""

    machine: Machine
    versions: dict[str, str]
    caches: dict[str, Storage]
    fusion: str
    """Its name; how the user named it, if it does not load."""

    file: str
    ingredients: Ingredients | None
    """None: the file does not load."""

    memory: NeededMemory | None
    """None: a model is missing."""

    speeds: tuple[Speed, ...]
    findings: tuple[Finding, ...]
    serve: str
    """The command that serves it."""

    @property
    def page(self) -> str:
        """As text."""
        parts = [
            machine_lines(self.machine, self.versions, self.caches),
            fusion_lines(self.fusion, self.file, self.ingredients, self.memory),
            *([speed_lines(self.speeds)] if self.speeds else []),
            what_to_do(self.findings, self.serve),
        ]
        return "\n\n".join("\n".join(lines) for lines in parts)

    @property
    def as_json(self) -> dict[str, Any]:
        """As a JSON object; `bfloat16` says what the processor's flags mean."""
        return asdict(self) | {"bfloat16": self.machine.processor.meaning}


def run(argv: Sequence[str], cache: str | None = None) -> int:
    """The command; returns the exit status: 0, or 1 if the fusion cannot be served here. `cache` is the default of
    `--cache`.

    Raises:
        CommandError, FusionError: one line for the user: an unknown flag, a fusion file that is not there.
    """
    settings = parse_settings(argv, cache)
    path = find_fusion(settings.fusion)
    os.environ["HF_HUB_OFFLINE"] = "1"  # before the hub's library is imported: what is not here is a finding
    diagnosis = diagnose(settings, path)
    if settings.measure:
        diagnosis = measured(diagnosis, settings)
    print(json.dumps(diagnosis.as_json, indent=2) if settings.as_json else diagnosis.page, flush=True)
    return int(bool(diagnosis.findings))


def diagnose(settings: DoctorSettings, path: Path) -> Diagnosis:
    """Look at machine, packages, caches and the fusion of a file; changes nothing."""
    from huggingface_hub.constants import HF_HUB_CACHE

    shown, cache_dir = shlex.quote(settings.fusion), cache_folder(settings.cache)
    machine = look(seen_gpus())
    own_cache = look_at(cache_dir)
    name, ingredients, memory = settings.fusion, None, None
    extra = engine_extra(bool(machine.gpus))
    try:
        fusion = load_fusion(path)
    except FusionError as error:
        findings = [*missing_packages([extra]), Finding.of(error)]
    else:
        name = fusion.name
        ingredients = look_into(fusion, shown, cache_dir)
        findings = [*missing_packages(_extras(fusion, extra)), *ingredients.findings]
        findings += _storage_findings(own_cache, ingredients, shown)
        shapes = [one.shape for one in ingredients.specialists if one.shape is not None]
        if ingredients.max_model_len is not None and len(shapes) == len(fusion.specialists):
            memory = needed_memory(fusion, shapes, machine, on_gpu=extra == "cuda")
            findings += memory_findings(fusion, shown, memory, ingredients.max_model_len, machine)
    return Diagnosis(
        machine=machine,
        versions={name.removeprefix("version of "): number for name, number in installed_versions().items()},
        caches={"cache": own_cache, "hub's cache": look_at(Path(HF_HUB_CACHE))},
        fusion=name,
        file=str(path),
        ingredients=ingredients,
        memory=memory,
        speeds=(),
        findings=tuple(findings),
        serve=f"ultrafuser serve {shown}" + (f" --cache {shlex.quote(settings.cache)}" if settings.cache else ""),
    )


def measured(diagnosis: Diagnosis, settings: DoctorSettings) -> Diagnosis:
    """With speeds, or with the reason why there are none; the same where something is missing."""
    if diagnosis.findings:
        print("ultrafuser: not measured, as something is missing", file=sys.stderr)
        return diagnosis
    print("ultrafuser: starting the engine to measure", file=sys.stderr, flush=True)
    try:
        return replace(diagnosis, speeds=tuple(measure(diagnosis.file, settings.cache)))
    except MeasuringError as error:
        return replace(diagnosis, findings=(Finding(str(error), "put that right, and measure again"),))


def _extras(fusion: FusionConfig, engine: str) -> list[str]:
    return [engine, "ray"] if fusion.engine.distributed_executor_backend == "ray" else [engine]


def _storage_findings(cache: Storage, ingredients: Ingredients, shown: str) -> list[Finding]:
    """Whether what the first start makes has a place."""
    if not ingredients.to_prepare:
        return []
    other = f"ultrafuser serve {shown} --cache FOLDER"
    if not cache.is_writable:
        return [Finding(f"cache: {cache.path} cannot be written", other)]
    if ingredients.prepared_bytes > cache.free_bytes:
        sizes = f"{gib(ingredients.prepared_bytes)} to prepare, {gib(cache.free_bytes)} free"
        return [Finding(f"cache: no room in {cache.path} ({sizes})", f"make room there, or {other}")]
    return []
