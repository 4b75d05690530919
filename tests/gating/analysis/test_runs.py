"""Curves of training runs: read from manifests and checkpoints, one panel per number, one look per run."""

import json

import numpy as np
import pytest

from ultrafuser.gating.analysis.curves import draw_curves
from ultrafuser.gating.analysis.runs import read_runs
from ultrafuser.gating.errors import CommandError

LOG = [
    {"step": 0, "eval_loss": 2.0, "eval_loss_math": 1.5, "eval_loss_math_hard": 2.5,
     "eval_gate_math_a": 0.25, "eval_gate_math_hard_a": 0.5, "eval_gate_math_b": 0.75, "eval_gate_math_hard_b": 0.5},
    {"step": 1, "loss": 3.0, "learning_rate": 0.1},
    {"step": 2, "loss": 2.0},
    {"step": 2, "train_loss": 2.5, "train_runtime": 1.0},
]  # fmt: skip


def write(folder, history, name="manifest.json", key="history"):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps({key: history}))
    return str(folder)


def test_a_runs_numbers_are_told_apart_though_names_contain_each_other(tmp_path):
    (run,) = read_runs([write(tmp_path / "one", LOG)])
    assert run.label == "one"
    assert (run.loss.steps, run.loss.values) == ([1, 2], [3.0, 2.0])
    assert run.eval_loss.values == [2.0]
    assert {name: series.values for name, series in run.domains.items()} == {"math": [1.5], "math_hard": [2.5]}
    assert {name: series.values for name, series in run.gate["math"].items()} == {"a": [0.25], "b": [0.75]}
    assert {name: series.values for name, series in run.gate["math_hard"].items()} == {"a": [0.5], "b": [0.5]}


def test_a_run_that_is_not_done_gives_its_newest_checkpoint(tmp_path):
    for step in (9, 10):
        write(tmp_path, LOG[:1] + LOG[1:2] * step, f"run/checkpoint-{step}/trainer_state.json", "log_history")
    (run,) = read_runs([str(tmp_path)])
    assert len(run.loss.steps) == 10


def test_runs_of_one_name_are_labelled_by_their_paths(tmp_path):
    folders = [write(tmp_path / seed / "direct", LOG) for seed in ("1", "2")]
    assert [run.label for run in read_runs(folders)] == folders


def test_runs_with_the_same_label_look_the_same(tmp_path):
    folders = [write(tmp_path / name, LOG) for name in ("one", "two", "a=b")]
    runs = read_runs([f"seeds={folders[0]}", f"seeds={folders[1]}", folders[2]])
    assert [run.label for run in runs] == ["seeds", "seeds", "a=b"]
    figure = draw_curves(runs)
    first, second, third = [(line.get_color(), line.get_marker()) for line in figure.axes[0].lines]
    assert first == second != third
    assert [text.get_text() for text in figure.legends[0].get_texts()][:2] == ["seeds", "a=b"]


def test_many_runs_all_look_different(tmp_path):
    runs = read_runs([write(tmp_path / str(index), LOG) for index in range(20)])
    lines = draw_curves(runs).axes[0].lines
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 20


@pytest.mark.parametrize(
    ("history", "complaint"),
    [
        (None, "has no run of `ultrafuser train`; name its --output folder"),
        ([], "has logged no loss; look at it again"),
    ],
)
def test_a_folder_without_curves_is_told_in_one_line(tmp_path, history, complaint):
    folder = str(tmp_path) if history is None else write(tmp_path, history)
    with pytest.raises(CommandError, match=rf"^--run: {folder} {complaint}"):
        read_runs([folder])


def test_each_number_has_a_panel_and_each_run_a_curve_in_it(tmp_path):
    other = [{**LOG[0], "eval_loss_math": 1.25}, {"step": 4, "loss": 1.0}]
    runs = read_runs([write(tmp_path / "one", LOG), write(tmp_path / "two", other)])
    charts = {chart.get_title(): chart for chart in draw_curves(runs).axes}
    assert list(charts) == [
        "training loss", "evaluation loss, mean of domains", "evaluation loss, math", "evaluation loss, math_hard",
        "mean gate weights, math", "mean gate weights, math_hard",
    ]  # fmt: skip
    losses = charts["training loss"].lines
    assert [np.asarray(line.get_ydata()).tolist() for line in losses] == [[3.0, 2.0], [1.0]]
    assert len({line.get_color() for line in losses}) == len({line.get_marker() for line in losses}) == 2
    assert [np.asarray(line.get_ydata()).tolist() for line in charts["evaluation loss, math"].lines] == [[1.5], [1.25]]
    weights = charts["mean gate weights, math"].lines
    assert len({(line.get_color(), line.get_linestyle()) for line in weights}) == len(weights) == 4
    labels = [text.get_text() for text in draw_curves(runs).legends[0].get_texts()]
    assert labels == ["one", "two", "weight of a", "weight of b"]


def test_a_run_without_evaluation_or_gate_has_no_empty_panels(tmp_path):
    alone = [{"step": 0, "eval_loss": 2.0, "eval_loss_math": 2.0, "eval_gate_math_math": 1.0}]
    titles = [chart.get_title() for chart in draw_curves(read_runs([write(tmp_path / "one", LOG[1:3])])).axes]
    assert titles == ["training loss"]
    titles = [chart.get_title() for chart in draw_curves(read_runs([write(tmp_path / "two", alone)])).axes]
    assert titles == ["evaluation loss, math"]
