"""A run that ends when its evaluations get no better: which model is best, that it is kept, loaded and the result."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.gating.examples import CONVERSATIONS
from tests.gating.training.runs import weights_of
from ultrafuser.gating.commands.run_folder import RUN_FOLDER
from ultrafuser.gating.errors import TrainError
from ultrafuser.gating.training.command import train
from ultrafuser.gating.training.trainer import FusedTrainer

# Too high a learning rate: the third evaluation is the best, and after the sixth three in a row were none.
EARLY = {
    "stage": 1, "steps": 12, "learning_rate": 0.1, "eval_every": 1, "eval_data": [str(CONVERSATIONS)],
    "save_every": 5, "early_stopping_patience": 3, "report_to": ["none"],
}  # fmt: skip


def manifest_of(fusion: Path) -> dict[str, Any]:
    return json.loads((fusion.parent / "manifest.json").read_text())


def evaluations(fusion: Path) -> dict[int, float]:
    return {entry["step"]: entry["eval_loss"] for entry in manifest_of(fusion)["history"] if "eval_loss" in entry}


def checkpoints(output: Path) -> list[str]:
    return sorted(path.name for path in (output / RUN_FOLDER).glob("checkpoint-*"))


def trained(output: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(output / RUN_FOLDER / f"checkpoint-{step}" / "trained.safetensors")


def test_the_result_is_the_best_model_and_not_the_last(run, capsys):
    path = run(**EARLY, keep_checkpoints=1)
    losses = evaluations(path)
    assert list(losses) == [0, 1, 2, 3, 4, 5, 6], "three evaluations in a row were no better"
    best = min(range(1, 7), key=lambda step: losses[step])
    assert best == 3
    manifest = manifest_of(path)
    assert manifest["best"] == {"step": best, "eval_loss": losses[best]}
    assert manifest["metrics"]["eval_loss"] == losses[best], "the loaded model was evaluated"
    assert f"best: step {best}, mean loss {losses[best]:.4f}" in capsys.readouterr().err
    assert checkpoints(path.parent) == ["checkpoint-3", "checkpoint-6"], "the best one beside the newest one"
    gate = {key.removeprefix("fusion_gate."): tensor for key, tensor in trained(path.parent, best).items()}
    last = {key.removeprefix("fusion_gate."): tensor for key, tensor in trained(path.parent, 6).items()}
    result = {key.removeprefix("fusion_gate."): tensor for key, tensor in weights_of(path).items()}
    assert gate.keys() <= result.keys()
    assert all(torch.equal(result[key], tensor) for key, tensor in gate.items())
    assert not all(torch.equal(result[key], tensor) for key, tensor in last.items())
    state = json.loads((path.parent / RUN_FOLDER / "checkpoint-6" / "trainer_state.json").read_text())
    assert (state["best_global_step"], state["best_metric"]) == (best, losses[best])


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


def assert_same_gate(ours: Path, theirs: Path) -> None:
    assert_same(*(load_file(folder / "gate.safetensors") for folder in (ours, theirs)))


def stop_in(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Ctrl-C in a step that is being made."""
    make = FusedTrainer.training_step

    def interrupted(self: FusedTrainer, *arguments: Any) -> torch.Tensor:
        if self.state.global_step == step - 1:
            raise KeyboardInterrupt
        return make(self, *arguments)

    monkeypatch.setattr(FusedTrainer, "training_step", interrupted)


def test_a_resumed_run_stops_where_an_uninterrupted_one_does_with_the_same_best_model(
    run, settings_of, tmp_path, monkeypatch
):
    """Transformers' own callback forgets how many evaluations were no better, and would go on to step 8."""
    whole = run(**EARLY, output=str(tmp_path / "whole"))
    stopped = tmp_path / "stopped"
    stop_in(monkeypatch, 6)
    with pytest.raises(KeyboardInterrupt):
        train(settings_of(**EARLY, output=str(stopped)))
    monkeypatch.undo()
    assert checkpoints(stopped)[-1] == "checkpoint-5"
    moved = tmp_path / "moved"
    shutil.move(stopped, moved)
    resumed = run(**EARLY, output=str(moved), resume=True)
    assert evaluations(resumed) == evaluations(whole)
    assert manifest_of(resumed)["best"] == manifest_of(whole)["best"]
    for step in (3, 6):
        assert_same(trained(moved, step), trained(whole.parent, step))
    assert_same_gate(moved, whole.parent)
    again = run(**EARLY, output=str(moved), resume=True)
    assert checkpoints(moved)[-1] == "checkpoint-6", "a run that had stopped makes no further step"
    assert_same_gate(again.parent, whole.parent)


def test_a_loss_that_is_no_number_is_never_the_best(run, monkeypatch):
    evaluate = FusedTrainer._evaluate_domain

    def lost(self: FusedTrainer, *arguments: Any) -> tuple[float, list[float]]:
        loss, marks = evaluate(self, *arguments)
        is_lost = self.is_in_train and self.state.global_step in (1, 3)
        return (math.nan if is_lost else loss), marks

    monkeypatch.setattr(FusedTrainer, "_evaluate_domain", lost)
    path = run(**EARLY)
    losses = evaluations(path)
    finite = {step: loss for step, loss in losses.items() if step and not math.isnan(loss)}
    assert set(losses) - set(finite) == {0, 1, 3}
    best = manifest_of(path)["best"]
    assert best == {"step": 4, "eval_loss": min(finite.values())}
    assert max(losses) == 7, "three after the best one"


def test_a_best_checkpoint_that_evaluates_to_something_else_is_no_result(settings_of, tmp_path, monkeypatch):
    load = FusedTrainer.load_best

    def spoil_and_load(self: FusedTrainer) -> int | None:
        file = tmp_path / "out" / RUN_FOLDER / "checkpoint-3" / "trained.safetensors"
        save_file({key: torch.zeros_like(tensor) for key, tensor in load_file(file).items()}, file)
        return load(self)

    monkeypatch.setattr(FusedTrainer, "load_best", spoil_and_load)
    with pytest.raises(TrainError, match=r"checkpoint-3: the best checkpoint's eval_loss is .* now and was 13\."):
        train(settings_of(**EARLY))
    assert not (tmp_path / "out" / "fusion.yaml").exists()


def test_a_run_goes_on_from_where_its_best_checkpoint_is_whole_too(run, settings_of, tmp_path, monkeypatch, capsys):
    whole = run(**EARLY, output=str(tmp_path / "whole"))
    stopped = tmp_path / "stopped"
    options = {**EARLY, "save_every": 1, "keep_checkpoints": 5, "output": str(stopped)}
    stop_in(monkeypatch, 6)
    with pytest.raises(KeyboardInterrupt):
        train(settings_of(**options))
    monkeypatch.undo()
    (stopped / RUN_FOLDER / "checkpoint-3" / "trained.safetensors").write_bytes(b"")
    capsys.readouterr()
    resumed = run(**options, resume=True)
    said = capsys.readouterr().err
    assert "checkpoint-5: the best one before it, checkpoint-3: trained.safetensors has 0 bytes of " in said
    assert "; going on from checkpoint-2\n" in said
    assert manifest_of(resumed)["best"] == manifest_of(whole)["best"]
    assert_same_gate(stopped, whole.parent)
    for name in checkpoints(stopped)[:-1]:
        shutil.rmtree(stopped / RUN_FOLDER / name)
    with pytest.raises(TrainError, match=r"checkpoint-6: the best one before it, checkpoint-3: is missing, and no"):
        train(settings_of(**options, resume=True))


def test_without_patience_the_last_model_is_the_result(run):
    path = run(**{**EARLY, "early_stopping_patience": None, "steps": 4})
    assert "best" not in manifest_of(path)
    assert manifest_of(path)["metrics"]["eval_loss"] == evaluations(path)[4] > evaluations(path)[3]
