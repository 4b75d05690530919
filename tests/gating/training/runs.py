"""What the tests of training read out of a run's folder."""

import json
from pathlib import Path

import torch

from ultrafuser.gating.data.batches import collate_rows
from ultrafuser.gating.model.fusion import load_fusion
from ultrafuser.gating.model.materialize import materialize
from ultrafuser.gating.model.reference import UltraFuserForCausalLM
from ultrafuser.gating.training.inputs import gather_inputs
from ultrafuser.gating.training.settings import TrainSettings


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    """All of a fusion's weights, as the reference loads them (adapters merged)."""
    config = materialize(load_fusion(path), path.parent / "merged", on_progress=lambda step, share: None)
    return UltraFuserForCausalLM.from_fusion(config).state_dict()


def loss_of(path: Path, settings: TrainSettings) -> float:
    """The reference's own loss of the fusion on the training rows."""
    config = materialize(load_fusion(path), path.parent / "merged", on_progress=lambda step, share: None)
    rows = gather_inputs(settings).rows.dataset
    batch = collate_rows([rows[index] for index in range(len(rows))])
    batch.pop("labels")
    with torch.no_grad():
        loss = UltraFuserForCausalLM.from_fusion(config)(**batch).loss
    assert loss is not None
    return float(loss)


def losses_in(output: Path) -> list[float]:
    history = json.loads((output / "manifest.json").read_text())["history"]
    return [entry["loss"] for entry in history if "loss" in entry]
