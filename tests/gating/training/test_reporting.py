"""What a run tells while it learns: a real tracker gets it, and one that fails does no harm."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from tests.gating.examples import CONVERSATIONS
from ultrafuser.gating.commands.run_folder import RUN_FOLDER
from ultrafuser.gating.training.reporting import EvaluationReport
from ultrafuser.server.__main__ import EXIT_WRONG_INPUT, main

NAMES = ("text", "code", "math")


class FailingTracker(TrainerCallback):
    """Is installed, begins, and loses its server at the second log."""

    calls: list[str]

    def __init__(self) -> None:
        type(self).calls = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.calls.append("begin")

    def on_log(self, *_: Any, **__: Any) -> None:
        self.calls.append("log")
        if len(self.calls) > 2:
            raise ConnectionError("no route\nto host")

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.calls.append("end")


def trained_weights(fusion: Path) -> dict[str, torch.Tensor]:
    return load_file(fusion.parent / RUN_FOLDER / "checkpoint-4" / "trained.safetensors")


def events(fusion: Path) -> list[Path]:
    return list((fusion.parent / RUN_FOLDER).rglob("events.out.tfevents.*"))


def test_tensorboard_gets_every_loss_and_evaluation(run):
    path = run(stage=1, eval_data=[str(CONVERSATIONS)], eval_every=2)
    (file,) = events(path)
    log = EventAccumulator(str(file)).Reload()
    history = json.loads((path.parent / "manifest.json").read_text())["history"]
    for tag, key in [("train/loss", "loss"), *((f"eval/loss_{name}", f"eval_loss_{name}") for name in NAMES)]:
        wanted = [(entry["step"], entry[key]) for entry in history if key in entry]
        assert len(wanted) in (3, 4)
        assert [(item.step, item.value) for item in log.Scalars(tag)] == [
            (step, pytest.approx(value, rel=1e-6)) for step, value in wanted
        ]


def test_a_tracker_that_fails_is_named_once_and_changes_nothing(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "failing", FailingTracker)
    without = run(stage=1, report_to=["none"], output=str(tmp_path / "without"))
    assert not events(without)
    path = run(stage=1, report_to=["failing", "tensorboard"])
    said = capsys.readouterr().err
    assert said.count("warning: the tracker failing failed (ConnectionError: no route to host) and gets nothing") == 1
    assert FailingTracker.calls == ["begin", "log", "log"], "it is left out from then on"
    ours, theirs = trained_weights(path), trained_weights(without)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    log = EventAccumulator(str(events(path)[0])).Reload()
    assert [item.step for item in log.Scalars("train/loss")] == [1, 2, 3, 4], "the other one has all"


def test_every_evaluation_is_a_line_with_each_domains_loss_and_the_time_left(run, capsys):
    path = run(stage=1, eval_data=[str(CONVERSATIONS)], eval_every=2)
    lines = re.findall(r"step \d.*(?=\n)", capsys.readouterr().err)
    history = json.loads((path.parent / "manifest.json").read_text())["history"]
    wanted = []
    for entry in [entry for entry in history if "eval_loss" in entry]:
        losses = ", ".join(f"{name} {entry[f'eval_loss_{name}']:.4f}" for name in ("code", "math", "text"))
        wanted.append(f"step {entry['step']} of 4: loss {losses}; mean {entry['eval_loss']:.4f}")
    begin, middle, end = lines
    assert [begin, middle.rpartition("; about ")[0], end] == wanted
    assert re.search(r"; about 0:00:\d\d left$", middle)


def test_the_time_left_of_a_resumed_run_is_that_of_its_own_steps(monkeypatch, capsys):
    """Transformers' bar takes the steps of before for steps of now, and promises too much."""
    report, arguments, control = EvaluationReport(), TrainingArguments(report_to="none"), TrainerControl()
    clock = iter([100.0, 160.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    report.on_train_begin(arguments, TrainerState(global_step=5000, max_steps=5100), control)
    metrics = {"eval_loss_text": 2.0, "eval_before_loss_text": 9.0, "eval_loss": 2.0}
    report.on_evaluate(arguments, TrainerState(global_step=5010, max_steps=5100), control, metrics)
    assert capsys.readouterr().err == "step 5,010 of 5,100: loss text 2.0000; mean 2.0000; about 0:09:00 left\n"


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("missing", "missing cannot be used here (RuntimeError: It requires missing to be installed.); install it, or"),
        ("wandbb", "'wandbb' is no tracker; name some of "),
    ],
)
def test_a_tracker_that_is_missing_or_unknown_is_one_line_before_any_work(
    tmp_path, monkeypatch, capsys, name, complaint
):
    def missing() -> TrainerCallback:
        raise RuntimeError("It requires missing\nto be installed.")

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "missing", missing)
    argv = ["train", "demo", "--stage", "1", "--data", str(CONVERSATIONS), "--report-to", name]
    assert main([*argv, "--output", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]) == EXIT_WRONG_INPUT
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"ultrafuser: --report-to: {complaint}")
    assert not list(tmp_path.iterdir())
