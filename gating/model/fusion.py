"""The fusion file: one YAML file that describes a fused model. Load it, save it, find a preset.

Reads and writes only the file itself and the chat templates it names; `gating/model/inspection.py` looks at the models.
Paths in the file are relative to the file. Everything a reader of fusion files needs is importable from here.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ultrafuser.gating.errors import FusionError
from ultrafuser.gating.model.inspection import FusedModelInfo, inspect_fusion
from ultrafuser.gating.model.schema import (
    PACKAGE_SCHEME,
    EngineSettings,
    FusionConfig,
    SamplingDefaults,
    SpecialistConfig,
)
from ultrafuser.gating.templates import TemplateError, load_template
from ultrafuser.gating.yaml_text import YamlError, parse_yaml

__all__ = [
    "EngineSettings",
    "FusedModelInfo",
    "FusionConfig",
    "FusionError",
    "SamplingDefaults",
    "SpecialistConfig",
    "find_fusion",
    "inspect_fusion",
    "load_fusion",
    "preset_names",
    "save_fusion",
]

PRESET_FOLDER = Path(__file__).parents[1] / "presets"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def preset_names() -> tuple[str, ...]:
    """Names of the shipped fusion files, usable wherever a path is."""
    return tuple(sorted(path.stem for path in PRESET_FOLDER.glob("*.yaml")))


def load_fusion(path_or_preset: str | Path) -> FusionConfig:
    """Read and check one fusion file; relative paths become absolute, chat templates become their text.

    Args:
        path_or_preset: a YAML file, a folder with a `fusion.yaml`, or the name of a preset.

    Raises:
        FusionError: no such file, not YAML, a key that is there twice, unknown or unfit, a missing template. One line
            that names the key.
    """
    path = find_fusion(path_or_preset)
    try:
        content = parse_yaml(path.read_bytes())
    except YamlError as error:
        raise FusionError(f"{path}: not a YAML file: {error}; correct it") from error
    except OSError as error:
        raise FusionError(f"{path}: cannot be read ({error.strerror}); name another file") from error
    if not isinstance(content, dict):
        raise FusionError(f"{path}: must be a mapping with the keys {', '.join(FusionConfig.model_fields)}")
    try:
        config = FusionConfig.model_validate(content)
    except ValidationError as error:
        raise FusionError(_one_line(error)) from error
    return _resolve(config, path.parent)


def save_fusion(config: FusionConfig, path: str | Path) -> None:
    """Write a fusion file that `load_fusion` reads back equal; paths below its folder are written relative to it."""
    folder = Path(path).resolve().parent
    content = config.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    for section in [content, *content["specialists"]]:
        for key in section.keys() & {"model", "adapter", "gate"}:
            section[key] = _relative(section[key], folder)
    speculation = content.get("engine", {}).get("speculation", {})
    if "path" in speculation:
        speculation["path"] = _relative(speculation["path"], folder)
    text = yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    Path(path).write_text(text, encoding="utf-8")


class _Dumper(yaml.SafeDumper):
    """Writes text of several lines (templates) as a block, so that a person can read it."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)


def find_fusion(path_or_preset: str | Path) -> Path:
    """The file that `load_fusion` reads.

    Raises:
        FusionError: no such file.
    """
    path = Path(os.path.expanduser(path_or_preset))
    if os.path.isdir(path):  # unlike pathlib's, an answer for names that are too long, too
        path = path / "fusion.yaml"
    if os.path.isfile(path):
        return path.resolve()
    preset = PRESET_FOLDER / f"{path_or_preset}.yaml"
    if preset.parent == PRESET_FOLDER and os.path.isfile(preset):
        return preset
    raise FusionError(
        f"{path_or_preset!s:.200}: no such fusion file; give a YAML file or one of {', '.join(preset_names())}"
    )


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, FusionError):
        return str(cause) if key and str(cause).startswith(key) else ".".join(filter(None, [key, str(cause)]))
    if first["type"] == "extra_forbidden":
        return f"{key}: unknown key; known here: {', '.join(_known_keys(first['loc'][:-1]))}"
    if first["type"] == "missing":
        return f"{key}: missing; add it"
    value = repr(first["input"])
    return f"{key}: {first['msg']}, got {value if len(value) <= 60 else value[:57] + '...'}; change the value"


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    sections: Mapping[str, Any] = {
        "specialists": SpecialistConfig,
        "sampling_defaults": SamplingDefaults,
        "engine": EngineSettings,
    }
    section = sections[str(location[0])] if location else FusionConfig
    return list(section.model_fields)


def _resolve(config: FusionConfig, folder: Path) -> FusionConfig:
    specialists = []
    for index, specialist in enumerate(config.specialists):
        key = f"specialists.{index}"
        changes = {
            "model": resolve_source(specialist.model, folder, f"{key}.model"),
            "adapter": specialist.adapter and resolve_source(specialist.adapter, folder, f"{key}.adapter"),
            "chat_template": specialist.chat_template,
        }
        if specialist.chat_template is not None:
            try:
                changes["chat_template"] = load_template(specialist.chat_template, folder)
            except TemplateError as error:
                raise FusionError(f"{key}.chat_template: {error}") from error
        specialists.append(specialist.model_copy(update=changes))
    gate = config.gate
    if gate is not None and not gate.startswith(PACKAGE_SCHEME):
        gate = _absolute(gate, folder)
    engine = resolve_draft_head(config.engine, folder)
    return config.model_copy(update={"specialists": tuple(specialists), "gate": gate, "engine": engine})


def resolve_draft_head(engine: EngineSettings, folder: Path) -> EngineSettings:
    """The settings with an absolute path of the draft head, if one is named."""
    speculation = engine.speculation
    if speculation is None or speculation.path is None:
        return engine
    resolved = speculation.model_copy(update={"path": _absolute(speculation.path, folder)})
    return engine.model_copy(update={"speculation": resolved})


def resolve_source(source: str, folder: Path, key: str) -> str:
    """Where a model or adapter is. A folder beside the fusion file wins over a Hugging Face id of the same name; what
    looks like a path is one."""
    if source.startswith(PACKAGE_SCHEME):
        return source
    path = _absolute(source, folder)
    if os.path.isdir(path):
        return path
    if not source.startswith(".") and _HUB_ID.fullmatch(source):
        return source
    raise FusionError(f"{key}: {source!r} is neither a folder nor a Hugging Face id; correct the path")


def _absolute(path: str, folder: Path) -> str:
    return os.path.normpath(folder / Path(path).expanduser())


def _relative(source: str, folder: Path) -> str:
    path = Path(source)
    return f"./{path.relative_to(folder)}" if path.is_absolute() and path.is_relative_to(folder) else source
