"""A trained fusion as a folder: fusion.yaml, gate, adapters or models, manifest; served and evaluated like any other.

Knows fusion files and what specialists write. Does not know how anything was trained.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gating.commands.run_folder import MANIFEST_FILE
from gating.files import replacing, write_json
from gating.model.fusion import save_fusion
from gating.model.gate import Gate, save_gate
from gating.model.loading import save_adapter, save_model
from gating.model.schema import FusionConfig, SpecialistConfig


def save_results(
    folder: Path,
    fusion: FusionConfig,
    prepared: FusionConfig,
    *,
    gate: Gate | None,
    trained: Mapping[str, tuple[Any, Mapping[str, Tensor]]],
    by_adapters: bool,
    manifest: Mapping[str, Any],
) -> Path:
    """Write a fusion folder; everything in it is whole or absent, and fusion.yaml comes last.

    Args:
        folder: the folder; what is of the same name in it is replaced.
        fusion: as it was loaded; what did not learn stays as it is, adapters are copied into the folder.
        prepared: the same with plain model folders, for tokenizers.
        gate: written if there is one; else the fusion's own gate stays.
        trained: models that learnt and their trained parameters, by specialist.
        by_adapters: whether they learnt by adapters or wholly.
        manifest: where it comes from, with its metrics.

    Returns:
        The path of fusion.yaml.
    """
    folder.mkdir(parents=True, exist_ok=True)
    specialists = []
    for own, plain in zip(fusion.specialists, prepared.specialists, strict=True):
        if own.name in trained:
            own = _save_trained(folder, own, plain, *trained[own.name], by_adapters=by_adapters)
        elif own.adapter is not None and Path(own.adapter).is_dir():
            own = _copy_adapter(folder, own)
        specialists.append(own)
    changes: dict[str, Any] = {"specialists": tuple(specialists)}
    if gate is not None:
        with replacing(folder / "gate.safetensors") as partial:
            save_gate(gate, partial, fusion.specialist_names)
        changes["gate"] = str((folder / "gate.safetensors").resolve())
    write_json(folder / MANIFEST_FILE, dict(manifest))
    with replacing(folder / "fusion.yaml") as partial:
        save_fusion(fusion.model_copy(update=changes), partial)
    return folder / "fusion.yaml"


def _save_trained(
    folder: Path,
    own: SpecialistConfig,
    plain: SpecialistConfig,
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    by_adapters: bool,
) -> SpecialistConfig:
    if by_adapters:
        target = folder / "adapters" / own.name
        with replacing(target) as partial:
            save_adapter(model, state, partial, base_model=own.model)
        return own.model_copy(update={"adapter": str(target.resolve())})
    target = folder / "specialists" / own.name
    with replacing(target) as partial:
        save_model(model, state, partial, plain)
    changes = {"model": str(target.resolve()), "revision": None, "adapter": None, "quantization": None}
    return own.model_copy(update=changes)


def _copy_adapter(folder: Path, own: SpecialistConfig) -> SpecialistConfig:
    target = (folder / "adapters" / own.name).resolve()
    source = Path(str(own.adapter)).resolve()
    if source != target:
        with replacing(target) as partial:
            shutil.copytree(source, partial)
    return own.model_copy(update={"adapter": str(target)})
