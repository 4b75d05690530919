"""What a run began with, by content: data files, the fusion's models, adapters, templates and gate.

A run that is resumed must have them as they were, wherever they are now; what it learnt so far is of no use with
others. Knows files and the fusion file; loads no weights.
"""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ultrafuser.gating.data.conversations import DataFile
from ultrafuser.gating.data.hub import open_data
from ultrafuser.gating.errors import TrainError
from ultrafuser.gating.files import content_digest, file_digest
from ultrafuser.gating.model.cache import Report, cache_folder
from ultrafuser.gating.model.schema import PACKAGE_SCHEME, SpecialistConfig
from ultrafuser.gating.training.inputs import choose
from ultrafuser.gating.training.newcomer import starting_fusion
from ultrafuser.gating.training.settings import TrainSettings

_BY_CONTENT = frozenset({"data", "eval_data", "fusion", "add"})
"""Settings that name files: another name for the same content is no change."""

_WAY_OUT = "put back what it had, or name another --output"


def describe_origins(settings: TrainSettings, on_progress: Report | None = None) -> dict[str, Any]:
    """What a run begins with, as JSON values.

    Raises:
        FusionError, DataError: it cannot be read.
    """
    loaded = starting_fusion(settings)
    fusion = choose(loaded, settings)
    cache_dir = cache_folder(settings.cache)
    data = open_data(settings.data, cache_dir, settings.limit, on_progress)
    eval_data = open_data(settings.eval_data, cache_dir, settings.eval_limit, on_progress)
    return {
        "data": [_data_file(file) for file in data],
        "eval_data": [_data_file(file) for file in eval_data],
        "specialists": {item.name: _specialist(item) for item in fusion.specialists},
        "gate": _gate(fusion.gate if settings.add is None else loaded.gate),
        "eos_token_ids": list(fusion.eos_token_ids),
    }


def check_resumed(provenance: Mapping[str, Any], settings: TrainSettings, origins: Mapping[str, Any]) -> None:
    """Hold a run that goes on against what its checkpoint says of it.

    Raises:
        TrainError: something is not what it was; names it.
    """
    _check_settings(provenance["lasting"], settings, _BY_CONTENT if "origins" in provenance else frozenset())
    before = provenance.get("origins")
    if before is None:  # of a checkpoint from before they were noted
        return
    for name in ("data", "eval_data"):
        _check_files(f"--{name.replace('_', '-')}", before[name], origins[name])
    _check_specialists(before["specialists"], origins["specialists"])
    for name in ("gate", "eos_token_ids"):
        if before[name] != origins[name]:
            raise TrainError(f"fusion: its {name} is not what the run to resume began with; {_WAY_OUT}")


def _check_settings(before: Mapping[str, Any], settings: TrainSettings, free: frozenset[str]) -> None:
    now = settings.lasting()
    # A setting that is younger than the checkpoint had what is its default now.
    before = {name: field.default for name, field in TrainSettings.model_fields.items() if name in now} | dict(before)
    for name in sorted((before.keys() | now.keys()) - free):
        if before.get(name) != now.get(name):
            raise TrainError(
                f"--{name.replace('_', '-')}: the run to resume had {before.get(name)!r}, now it is {now.get(name)!r};"
                " give what it had, or name another --output"
            )


def _check_files(flag: str, before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> None:
    if len(before) != len(now):
        raise TrainError(f"{flag}: the run to resume had {len(before)} files, now there are {len(now)}; {_WAY_OUT}")
    for old, new in zip(before, now, strict=True):
        if old["sha256"] != new["sha256"]:
            raise TrainError(
                f"{flag}: {new['file']} has another content than {old['file']} had in the run to resume; {_WAY_OUT}"
            )
        if old["domain"] != new["domain"]:
            raise TrainError(
                f"{flag}: {new['file']} was of domain {old['domain']!r}, now of {new['domain']!r}; {_WAY_OUT}"
            )


def _check_specialists(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    if list(before) != list(now):
        raise TrainError(f"fusion: the run to resume had {', '.join(before)}, now {', '.join(now)}; {_WAY_OUT}")
    for name, own in now.items():
        for part, content in own.items():
            old = before[name][part]
            if _is_hub_model(old) and _is_hub_model(content):
                _check_hub_model(name, old, content)
            elif old != content:
                raise TrainError(
                    f"fusion: the {part.replace('_', ' ')} of {name!r}{_changed_file(old, content)} is not what the"
                    f" run to resume began with; {_WAY_OUT}"
                )


def _is_hub_model(content: Any) -> bool:
    return isinstance(content, list)


def _check_hub_model(name: str, before: Sequence[str | None], now: Sequence[str | None]) -> None:
    """A commit is the same by whichever revision it was asked for; where it was never known, the revision has to do."""
    (old_model, old_revision, old_commit), (model, revision, commit) = before, now
    if model == old_model and old_commit is not None and commit is None:
        raise TrainError(
            f"fusion: the commit of the model of {name!r} cannot be found out, and the run to resume began with"
            f" {old_commit}; see that {model} can be reached on the hub, or name another --output"
        )
    is_known = old_commit is not None and commit is not None
    if model != old_model or (commit != old_commit if is_known else revision != old_revision):
        raise TrainError(f"fusion: the model of {name!r} is not what the run to resume began with; {_WAY_OUT}")


def _changed_file(before: Any, now: Any) -> str:
    """The first file that differs, of two folders."""
    if not isinstance(before, dict) or not isinstance(now, dict):
        return ""
    return f" ({next(file for file in sorted(before.keys() | now.keys()) if before.get(file) != now.get(file))})"


def _data_file(file: DataFile) -> dict[str, Any]:
    return {"file": file.name, "domain": file.domain, "sha256": file_digest(file.path)}


def _specialist(own: SpecialistConfig) -> dict[str, Any]:
    template = own.chat_template
    return {
        "model": _model(own),
        "adapter": own.adapter and (_folder(Path(own.adapter)) or own.adapter),
        "chat_template": template and hashlib.sha256(template.encode()).hexdigest(),
    }


def _model(own: SpecialistConfig) -> Any:
    """The files of a folder, the commit of a hub's model, or the name of a package's."""
    if own.model.startswith(PACKAGE_SCHEME):
        return own.model
    if files := _folder(Path(own.model)):
        return files
    from transformers import AutoConfig

    commit = None
    with suppress(OSError, ValueError, KeyError):  # told, with the key, when the models are prepared
        commit = AutoConfig.from_pretrained(own.model, revision=own.revision)._commit_hash
    return [own.model, own.revision, commit]


def _folder(folder: Path) -> dict[str, str]:
    """Contents of a model's files; what is written about it is not the model, nor what a download or Git notes."""
    if not folder.is_dir():
        return {}
    files = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name.as_posix(): content_digest(path) for name, path in files.items() if _is_of_the_model(name)}


def _is_of_the_model(name: Path) -> bool:
    return name.suffix != ".md" and not any(part.startswith(".") for part in name.parts)


def _gate(gate: str | None) -> str | None:
    return file_digest(Path(gate)) if gate is not None and Path(gate).is_file() else gate
