"""What must be the same on all nodes of an engine: nodes that differ would hang, or answer wrongly, without a sound.

Values are short texts by a name that says what to look at. Paths do not count: each node has its own.
"""

import json
import platform
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig

from ultrafuser import __version__
from ultrafuser.gating.files import content_digest
from ultrafuser.gating.model.gate_file import gate_digest
from ultrafuser.gating.model.schema import SpecialistConfig
from ultrafuser.server.engine.shared.dtype import dtypes_of
from ultrafuser.server.serving.installation import VLLM_VERSION, device_name
from ultrafuser.server.start.preparing import Prepared

_WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")
_SHOWN_CHARACTERS = 60
_SHOWN_PROBLEMS = 5
_PATHS_IN_CONFIGURATIONS = ("_name_or_path", "transformers_version")


def likeness(prepared: Prepared) -> dict[str, str]:
    """This node's values: versions, the fusion file, the engine's options, the gate, each specialist's files.

    Models of one's own are told apart by content (large files by pieces of it), prepared ones by their adapters and by
    the sizes of their files: what merging rounds may depend on the processor. Models on the hub: by the commit.
    """
    written, fusion, node = prepared.written, prepared.fusion, prepared.node
    values: dict[str, Any] = {
        "version of ultrafuser": __version__,
        "version of vllm": VLLM_VERSION,
        "version of torch": torch.__version__,
        "version of transformers": transformers.__version__,
        "version of python": platform.python_version(),
        "device": device_name(),
        "gate": gate_digest(fusion.gate),
        "specialists": ", ".join(written.specialist_names),
        "max_model_len": prepared.info.max_model_len,
    }
    if node is not None:
        values |= {"nnodes": node.num_nodes, "master_port": node.master_port}
    values |= written.model_dump(mode="json", exclude={"gate", "specialists", "engine"})
    engine = written.engine.model_dump(mode="json") | dict(prepared.engine_options)
    speculation = written.engine.speculation
    if speculation is not None and speculation.path is not None:
        head = _files(Path(speculation.path), by_content=True)
        engine["speculation"] = speculation.model_dump(mode="json", exclude={"path"}) | head
    values |= {f"engine.{name}": value for name, value in engine.items()}
    for before, after, dtype in zip(written.specialists, fusion.specialists, dtypes_of(fusion), strict=True):
        values |= {f"specialists.{after.name}.{key}": value for key, value in _specialist(before, after).items()}
        values[f"specialists.{after.name}.dtype"] = dtype
    return {name: _shown(value) for name, value in values.items()}


def differences(node: int | str, theirs: Mapping[str, str], first: str, own: Mapping[str, str]) -> list[str]:
    """What a node has otherwise than the `first` one, one line each."""
    return [
        f"node {node} differs from {first} in {name}: {theirs.get(name, 'nothing')}, not {own.get(name, 'nothing')}"
        for name in sorted(theirs.keys() | own.keys())
        if theirs.get(name) != own.get(name)
    ]


def one_line(problems: Sequence[str]) -> str:
    """The first of them, and how many more there are."""
    shown = "; ".join(problems[:_SHOWN_PROBLEMS])
    more = f"; and {len(problems) - _SHOWN_PROBLEMS} more" if len(problems) > _SHOWN_PROBLEMS else ""
    return shown + more


def _specialist(before: SpecialistConfig, after: SpecialistConfig) -> dict[str, Any]:
    values: dict[str, Any] = after.model_dump(mode="json", include={"chat_template", "quantization"})
    folder, is_own = Path(after.model), before.model == after.model
    if before.adapter is not None:
        adapter = Path(before.adapter)
        values["adapter"] = _files(adapter, by_content=True) if adapter.is_dir() else before.adapter
    if folder.is_dir():
        return values | _files(folder, by_content=is_own)
    commit = AutoConfig.from_pretrained(after.model, revision=after.revision)._commit_hash
    return values | {"model": f"{after.model} at {commit}"}


def _files(folder: Path, by_content: bool) -> dict[str, str]:
    """Of each file of weights its size, and what is in it; of the configuration what is in it."""
    values = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix in _WEIGHTS:
            content = f", {content_digest(path)}" if by_content else ""
            values[name] = f"{path.stat().st_size} bytes{content}"
        elif path.name == "config.json":
            config = json.loads(path.read_bytes())
            values[name] = _shown({key: config[key] for key in config if key not in _PATHS_IN_CONFIGURATIONS})
    return values


def _shown(value: Any) -> str:
    """A value that fits into a line; a long one by its digest."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text if len(text) <= _SHOWN_CHARACTERS else f"sha256:{sha256(text.encode()).hexdigest()[:16]}"
