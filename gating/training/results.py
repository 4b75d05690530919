"""A trained fusion as a folder: fusion.yaml, gate, adapters, models or draft head, manifest; served like any other.

Transformers' Auto classes load it, too: config.json and a source file say how.

Knows fusion files and what specialists write. Does not know how anything learnt what it did.
"""

import shutil
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import AutoTokenizer

from ultrafuser.gating.commands.run_folder import MANIFEST_FILE
from ultrafuser.gating.files import replacing, write_json
from ultrafuser.gating.model.draft_head import DraftHead, save_draft_head
from ultrafuser.gating.model.fusion import save_fusion
from ultrafuser.gating.model.gate import Gate
from ultrafuser.gating.model.gate_file import GATE_FILE, save_gate
from ultrafuser.gating.model.loading import save_adapter, save_model
from ultrafuser.gating.model.reference import UltraFuserConfig, UltraFuserForCausalLM
from ultrafuser.gating.model.schema import EngineSettings, FusionConfig, SpecialistConfig, SpeculationSettings
from ultrafuser.gating.training.draft_learner import DraftLearner
from ultrafuser.gating.training.inputs import RunInputs
from ultrafuser.gating.training.learner import Learner


def save_results(
    folder: Path, inputs: RunInputs, learner: Learner, state: Mapping[str, Tensor], manifest: Mapping[str, Any]
) -> Path:
    """Write a fusion folder; everything in it is whole or absent, and fusion.yaml comes last.

    Args:
        folder: the folder; what is of the same name in it is replaced.
        inputs: of the run; what did not learn stays as it was loaded.
        learner: what learnt.
        state: its trained parameters, whole, by name.
        manifest: where it comes from, with its metrics.

    Returns:
        The path of fusion.yaml.
    """
    trained = {}
    if inputs.settings.trains_specialists:
        models = zip(inputs.fusion.specialists, learner.get_submodule("specialists").children(), strict=True)
        for index, (prepared, model) in enumerate(models):
            trained[prepared.name] = (prepared, model, _below(state, f"specialists.{index}."))
    specialists = []
    for own in inputs.loaded.specialists:
        if own.name in trained:
            own = _save_trained(folder, own, *trained[own.name], by_adapters=inputs.settings.uses_adapters)
        specialists.append(own)
    gate, engine = None, inputs.loaded.without_draft_head().engine
    if isinstance(learner, DraftLearner):
        engine = _save_draft_head(folder / "draft-head", inputs, learner, state)
    elif learner.fusion_gate is not None:
        gate = deepcopy(learner.fusion_gate).cpu()
        gate.load_state_dict({**gate.state_dict(), **_below(state, "fusion_gate.")})
    fusion = inputs.loaded.model_copy(update={"specialists": tuple(specialists), "engine": engine})
    leader = inputs.fusion.specialists[0]
    AutoTokenizer.from_pretrained(leader.model, revision=leader.revision).save_pretrained(folder)
    return write_fusion(folder, fusion, gate, manifest)


def write_fusion(folder: Path, fusion: FusionConfig, gate: Gate | None, manifest: Mapping[str, Any]) -> Path:
    """Write a fusion's folder: the gate if it is a new one, copies of adapters, the manifest, and fusion.yaml last.

    Returns:
        The path of fusion.yaml.
    """
    folder.mkdir(parents=True, exist_ok=True)
    changes: dict[str, Any] = {"specialists": tuple(_with_copied_adapter(folder, own) for own in fusion.specialists)}
    if gate is not None:
        with replacing(folder / GATE_FILE) as partial:
            save_gate(gate, partial, fusion.specialist_names)
        changes["gate"] = str((folder / GATE_FILE).resolve())
    write_json(folder / MANIFEST_FILE, dict(manifest))
    config = UltraFuserConfig(specialist_names=list(fusion.specialist_names))
    config.architectures = [UltraFuserForCausalLM.__name__]
    if gate is not None:
        config.gate_width, config.gate_kind = gate.width, str(gate.kind)
        config.gate_projected_size = gate.projected_size
    config.save_pretrained(folder)
    with replacing(folder / "fusion.yaml") as partial:
        save_fusion(fusion.model_copy(update=changes), partial)
    return folder / "fusion.yaml"


def _save_draft_head(
    folder: Path, inputs: RunInputs, learner: DraftLearner, state: Mapping[str, Tensor]
) -> EngineSettings:
    """Write the head, and have the engine draft with it: as far ahead as it learnt to, unless the file says how far."""
    head = DraftHead(learner.draft_head.config)
    head.load_state_dict({**_below(state, "draft_head."), "draft_ids_V": learner.draft_head.draft_ids_V})
    save_draft_head(head, folder)
    before = inputs.loaded.engine.speculation or SpeculationSettings()
    is_said = "max_tokens" in before.model_fields_set and before.max_tokens > 0
    max_tokens = before.max_tokens if is_said else inputs.settings.draft_tokens
    speculation = SpeculationSettings(
        drafter="head",
        path=str(folder.resolve()),
        max_tokens=max_tokens,
        min_tokens=min(before.min_tokens, max_tokens),
    )
    return inputs.loaded.engine.model_copy(update={"speculation": speculation})


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _save_trained(
    folder: Path,
    own: SpecialistConfig,
    prepared: SpecialistConfig,
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
        save_model(model, state, partial, prepared)
    changes = {"model": str(target.resolve()), "revision": None, "adapter": None, "quantization": None}
    return own.model_copy(update=changes)


def _with_copied_adapter(folder: Path, own: SpecialistConfig) -> SpecialistConfig:
    if own.adapter is None or not Path(own.adapter).is_dir():
        return own
    target = (folder / "adapters" / own.name).resolve()
    source = Path(str(own.adapter)).resolve()
    if source != target:
        with replacing(target) as partial:
            shutil.copytree(source, partial)
    return own.model_copy(update={"adapter": str(target)})
