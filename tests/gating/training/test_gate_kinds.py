"""Training of every kind of gate: the reference's loss, learning, resumption bit for bit, and the kind asked for."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.fakes import build_gate, write_tiny_fusion
from tests.gating.examples import CONVERSATIONS
from tests.gating.training.runs import loss_of, losses_in
from ultrafuser.gating.data.batches import collate_hidden_states, collate_rows
from ultrafuser.gating.errors import TrainError
from ultrafuser.gating.model.fusion import load_fusion
from ultrafuser.gating.model.gate_file import gate_kind, save_gate
from ultrafuser.gating.model.gate_kind import CHANGES
from ultrafuser.gating.model.reference import UltraFuserForCausalLM
from ultrafuser.gating.training.building import build
from ultrafuser.gating.training.command import train
from ultrafuser.gating.training.inputs import gather_inputs
from ultrafuser.gating.training.plan import describe
from ultrafuser.gating.training.trainer import FusedTrainer

NAMES = ("text", "code", "math")
ALL = "+".join(CHANGES)
KINDS = ["paper", *CHANGES, ALL]


def with_gate(path: Path, kind: str) -> str:
    """The fusion with a random gate of a kind in the place of its own."""
    save_gate(build_gate(kind, NAMES, (64, 64, 64)), path.parent / "gate.safetensors", NAMES)
    return str(path)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_every_kind_is_the_references_on_rows_of_several_turns(tiny_copy, settings_of, kind):
    """Whole and cached, also where a row's turns are cut by the padding of others, and where a row follows itself, as
    at the end of an epoch: the cached one was read as one response of two."""
    fusion = with_gate(tiny_copy, kind)
    found = []
    for is_cached in (False, True):
        inputs = gather_inputs(settings_of(fusion=fusion, stage=1, cache_states=is_cached))
        trainer = build(inputs, torch.device("cpu"), lambda label, share: None, provenance={})
        rows = inputs.rows.dataset
        chosen = [index for index in range(len(rows)) if num_turns(rows[index]) > 1] + [0, 11, 11]
        assert len(chosen) == 6
        with torch.no_grad():
            if is_cached:
                cached: Any = trainer.train_dataset
                found.append(trainer.learner(**collate_hidden_states([cached[index] for index in chosen])))
            else:
                batch = collate_rows([rows[index] for index in chosen])
                found.append(trainer.learner(**batch))
    batch.pop("labels")
    with torch.no_grad():
        wanted = UltraFuserForCausalLM.from_fusion(load_fusion(fusion))(**batch)
    is_token = wanted.labels != -100
    for output in found:
        torch.testing.assert_close(output["loss"], wanted.loss, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(output["marks_XN"], wanted.gate_weights[:, is_token], rtol=0, atol=2e-4)


def num_turns(row: dict[str, Any]) -> int:
    mask = row["response_mask"][0]
    return sum(now and not before for before, now in zip([False, *mask], mask, strict=False))


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_gate_of_every_kind_lowers_the_loss_which_is_then_the_references(run, settings_of, kind):
    options: dict[str, Any] = {"gate_kind": kind, "fresh_gate": True, "domains": ["code"]}
    path = run(**options, stage=1, steps=30, learning_rate=1e-2, eval_data=[str(CONVERSATIONS)], cache_states=True)
    history = json.loads((path.parent / "manifest.json").read_text())["history"]
    losses = [entry["eval_loss_code"] for entry in history if "eval_loss_code" in entry]
    assert losses[-1] < losses[0] - 0.2
    assert loss_of(path, settings_of(stage=1, domains=["code"])) == pytest.approx(losses[-1], rel=1e-4)
    assert str(gate_kind(path.parent / "gate.safetensors")) == kind
    assert json.loads((path.parent / "manifest.json").read_text())["gate_kind"] == kind


@pytest.mark.parametrize(
    "options", [{"stage": 1, "cache_states": True}, {"stage": 1}, {"stage": 2}], ids=["cached", "whole", "adapters"]
)
def test_every_parameter_of_a_gate_of_all_changes_learns(run, tmp_path, options):
    start = tmp_path / "start" / "fusion.yaml"
    write_tiny_fusion(start.parent, gate=ALL)
    path = run(**options, fusion=str(start), steps=3, learning_rate=1e-2)
    before, after = (load_file(own.parent / "gate.safetensors") for own in (start, path))
    # The softmax takes no notice of what is added to all scores.
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert not still
    assert {"decay_logit", "log_temperatures", "biases", "memory.weight"} < before.keys()


@pytest.mark.parametrize("options", [{"stage": 1, "fresh_gate": True}, {"stage": 2, "fresh_gate": True}], ids=str)
def test_a_killed_run_of_all_changes_ends_bit_for_bit_where_a_whole_one_does(
    run, settings_of, tmp_path, monkeypatch, options
):
    common = {**options, "gate_kind": ALL, "steps": 4, "save_every": 2}
    whole = run(**common, output=str(tmp_path / "whole"))
    step = FusedTrainer.training_step

    def interrupted(self: FusedTrainer, *arguments: Any) -> torch.Tensor:
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(FusedTrainer, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(settings_of(**common, output=str(tmp_path / "stopped")))
    monkeypatch.undo()
    resumed = run(**common, output=str(tmp_path / "stopped"), resume=True)
    ours, theirs = (load_file(path.parent / "gate.safetensors") for path in (resumed, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert losses_in(resumed.parent) == losses_in(whole.parent)


def test_micro_batches_of_all_changes_add_up_to_the_whole_batch(run, tmp_path):
    """A step's scales get the gradients of all its micro-batches."""
    losses = [
        losses_in(
            run(
                stage=1,
                gate_kind=ALL,
                fresh_gate=True,
                micro_rows_per_domain=size,
                output=str(tmp_path / str(size)),
                learning_rate=1e-2,
            ).parent
        )
        for size in (4, 1)
    ]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=0)


def test_a_trained_gate_keeps_its_kind_and_no_other_can_be_asked_for(tiny_copy, run, settings_of, tmp_path):
    fusion = with_gate(tiny_copy, "joint+scaled")
    kept = run(fusion=fusion, stage=1, steps=1, output=str(tmp_path / "kept"))
    assert str(gate_kind(kept.parent / "gate.safetensors")) == "joint+scaled"
    assert run(fusion=fusion, stage=1, steps=1, gate_kind="scaled+joint", output=str(tmp_path / "same")).is_file()
    for stage in (1, 2):
        with pytest.raises(
            TrainError,
            match=r"^--gate-kind: is smoothed, but .*gate\.safetensors is of kind joint\+scaled; leave it out, or add"
            r" --fresh-gate to start from an untrained gate$",
        ):
            train(settings_of(fusion=fusion, stage=stage, gate_kind="smoothed", output=str(tmp_path / "other")))
    assert not (tmp_path / "other").exists()
    fresh = run(fusion=fusion, stage=1, steps=1, gate_kind="smoothed", fresh_gate=True, output=str(tmp_path / "fresh"))
    assert str(gate_kind(fresh.parent / "gate.safetensors")) == "smoothed"
    plain = run(fusion=fusion, stage=1, steps=1, fresh_gate=True, output=str(tmp_path / "plain"))
    assert str(gate_kind(plain.parent / "gate.safetensors")) == "paper"


def test_stage_2_begins_with_an_untrained_gate_of_the_kind_that_is_asked_for(tiny_copy, run):
    content = yaml.safe_load(tiny_copy.read_text())
    tiny_copy.write_text(yaml.safe_dump({**content, "gate": "package:fresh"}))
    path = run(fusion=str(tiny_copy), stage=2, steps=1, gate_kind="probabilities")
    assert str(gate_kind(path.parent / "gate.safetensors")) == "probabilities"


def test_a_run_goes_on_with_its_own_kind_or_not_at_all(run, settings_of, tiny_copy):
    options: dict[str, Any] = {"stage": 1, "fresh_gate": True, "steps": 2}
    run(**options, gate_kind="joint")
    with pytest.raises(TrainError, match=r"--gate-kind: the run to resume had 'joint', now it is 'scaled'; give what"):
        train(settings_of(**options, gate_kind="scaled", resume=True))
    with pytest.raises(TrainError, match=r"--gate-kind: the run to resume had 'joint', now it is None; give what it"):
        train(settings_of(**options, resume=True))


def test_a_run_does_not_go_on_from_a_fusion_whose_gate_has_become_another_kind(run, settings_of, tiny_copy):
    fusion = with_gate(tiny_copy, "scaled")
    run(fusion=fusion, stage=1, steps=2)
    with_gate(tiny_copy, "joint")
    with pytest.raises(TrainError, match="fusion: its gate is not what the run to resume began with"):
        train(settings_of(fusion=fusion, stage=1, steps=2, resume=True))


@pytest.mark.parametrize(
    ("kind", "count"),
    [("paper", 33_793), ("joint", 100_355), ("scaled", 33_799), ("smoothed", 66_562)],
)
def test_the_plan_says_the_kind_and_how_many_parameters_it_has(settings_of, kind, count):
    inputs = gather_inputs(settings_of(stage=1, gate_kind=kind, fresh_gate=True))
    assert f"gate ({kind}): {count:,} parameters, all learn" in describe(inputs, torch.device("cpu"), 1)


def test_evaluation_during_training_reads_a_smoothed_gate_response_by_response(run, settings_of):
    path = run(
        stage=1, gate_kind="smoothed", fresh_gate=True, steps=2, eval_data=[str(CONVERSATIONS)], micro_rows_per_domain=1
    )
    metrics = json.loads((path.parent / "manifest.json").read_text())["metrics"]
    rows = gather_inputs(settings_of(stage=1)).rows
    model = UltraFuserForCausalLM.from_fusion(load_fusion(path))
    batch = collate_rows([rows.dataset[index] for index in rows.indices("code")])
    batch.pop("labels")
    with torch.no_grad():
        output = model(**batch)
    assert metrics["eval_loss_code"] == pytest.approx(float(output.loss), rel=1e-4)
