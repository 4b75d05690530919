"""What a run tells while it learns: a real tracker gets it, and one that fails does no harm."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from tests.gating.examples import CONVERSATIONS
from ultrafuser.gating.commands.run_folder import RUN_FOLDER
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
