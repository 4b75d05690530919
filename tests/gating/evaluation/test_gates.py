"""Gates of every kind on the same specialists, held against each other from one reading."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.fakes import build_gate
from tests.gating.examples import CONVERSATIONS
from ultrafuser.gating.data.batches import collate_rows
from ultrafuser.gating.data.conversations import DataFile
from ultrafuser.gating.errors import CommandError, GateError
from ultrafuser.gating.evaluation import held_out, passes
from ultrafuser.gating.evaluation.held_out import ReadingOptions, ReadingTask, find_gates, prepare_task
from ultrafuser.gating.evaluation.loss import LossTable, measure
from ultrafuser.gating.model.gate_file import save_gate
from ultrafuser.gating.model.gate_kind import CHANGES
from ultrafuser.gating.model.reference import UltraFuserForCausalLM
from ultrafuser.server.__main__ import EXIT_WRONG_INPUT, main

NAMES = ("text", "code", "math")
KINDS = ["paper", *CHANGES, "+".join(CHANGES)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def gates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random gate of every kind, each in a folder like that of a training, by its kind."""
    found = {}
    for kind in KINDS:
        found[kind] = tmp_path_factory.mktemp("gates") / "gate.safetensors"
        save_gate(build_gate(kind, NAMES, (64, 64, 64), seed=1), found[kind], NAMES)
    return found


def task_of(path: Path, cache: Path, gates: dict[str, Path]) -> ReadingTask:
    options = ReadingOptions(cache_dir=cache, precision="float32")
    return prepare_task(str(path), [DataFile.parse(str(CONVERSATIONS))], options, lambda label, share: None, gates)


def table_of(task: ReadingTask) -> LossTable:
    return measure(task, base=None, scale=0.4)


def test_each_gates_row_is_the_references_loss_with_that_gate(tiny_path, cache, gates, monkeypatch):
    """Also where a response is cut by a chunk of logits; and all rows come from one reading."""
    readings: list[Any] = []
    read = held_out.read
    monkeypatch.setattr(held_out, "read", lambda *own, **options: readings.append(1) or read(*own, **options))  # type: ignore[func-returns-value]
    task = task_of(tiny_path, cache, gates)
    table = table_of(task)
    assert sum(readings) == 1 + len([name for name in table.sums if name in ("base", "average", "task_arithmetic")])
    monkeypatch.setattr(passes, "CHUNK_SIZE", 7)
    in_chunks = table_of(task)
    batch = collate_rows([task.rows.dataset[row] for row in task.places["code"]])
    batch.pop("labels")
    for kind, path in gates.items():
        fusion = task.loaded.model_copy(update={"gate": str(path)})
        with torch.no_grad():
            wanted = float(UltraFuserForCausalLM.from_fusion(fusion)(**batch).loss)
        assert table.loss(f"gate:{kind}", "code") == pytest.approx(wanted, abs=2e-4)
        assert in_chunks.loss(f"gate:{kind}", "code") == pytest.approx(wanted, abs=2e-4)
    assert len({round(table.loss(f"gate:{kind}", "code"), 3) for kind in KINDS}) == len(KINDS)


def test_the_fusions_own_gate_differs_by_nothing_from_itself_and_the_others_by_what_the_losses_say(
    tiny_path, cache, gates
):
    own = tiny_path.parent / "gate.safetensors"
    table = table_of(task_of(tiny_path, cache, {"own": own, "joint": gates["joint"]}))
    assert table.kinds == {"fused": "paper", "gate:own": "paper", "gate:joint": "joint"}
    assert set(table.difference("gate:own", "fused").values()) == {(0.0, 0.0, 0.0)}
    for place in (*NAMES, "mean"):
        value, low, high = table.difference("gate:joint", "fused")[place]
        losses = [table.mean(row) if place == "mean" else table.loss(row, place) for row in ("gate:joint", "fused")]
        assert value == pytest.approx(losses[0] / losses[1] - 1)
        assert low < value < high
        loss, low, high = table.interval("gate:joint")[place]
        assert loss == pytest.approx(losses[0])
        assert low < loss < high


def test_an_interval_is_as_wide_as_the_standard_error_says():
    sums = np.random.default_rng(1).uniform(1, 100, size=300)
    table = LossTable({"fused": {"code": sums}}, {"code": np.full(300, 10.0)}, {})
    loss, low, high = table.interval("fused")["code"]
    assert loss == pytest.approx(sums.mean() / 10)
    assert high - low == pytest.approx(2 * 1.96 * sums.std() / 10 / np.sqrt(300), rel=0.1)


def test_the_command_prints_gates_with_their_kinds_and_intervals(tiny_path, cache, gates, tmp_path, capsys):
    argv = ["eval", str(tiny_path), "--loss", "--data", str(CONVERSATIONS), "--limit", "4", "--cache", str(cache)]
    argv += ["--gates", str(gates["joint"].parent), f"soft={gates['smoothed']}"]
    assert main([*argv, "--json", str(tmp_path / "loss.json")]) == 0
    found = json.loads((tmp_path / "loss.json").read_text())
    joint = f"gate:{gates['joint'].parent.name}"
    assert list(found["loss"])[-3:] == ["fused", joint, "gate:soft"]
    assert {name: own["kind"] for name, own in found["gates"].items()} == {
        "fused": "paper",
        joint: "joint",
        "gate:soft": "smoothed",
    }
    value, low, high = found["gates"]["gate:soft"]["interval"]["mean"]
    assert value == pytest.approx(found["loss"]["gate:soft"]["mean"])
    out = capsys.readouterr().out
    assert "| gate | kind | text | code | math | mean |" in out
    assert f"{value:.4f} [{low:.4f}, {high:.4f}]" in out
    assert out.count("| against fused |") == 2


def test_a_gate_is_called_as_its_folder_or_its_file_or_as_is_said(tmp_path):
    for name in ("a/gate.safetensors", "b/gate.safetensors", "c.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    paths = [str(tmp_path / "a"), str(tmp_path / "b" / "gate.safetensors"), str(tmp_path / "c.safetensors")]
    assert list(find_gates([*paths, f"mine={tmp_path / 'a'}"])) == ["a", "b", "c", "mine"]
    with pytest.raises(CommandError, match=r"^--gates: .* are both called 'a'; name one NAME=PATH$"):
        find_gates([paths[0], f"a={paths[1]}"])


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--loss", "--data", str(CONVERSATIONS), "--gates", "nowhere"], "nowhere: no such gate; name a gate's file"),
        (["--variants", "v", "--gates", "x"], "--gates: is for the loss; add --loss with --data"),
        (["--variants", "v", "--mixed-turns", "4"], "--mixed-turns: is for the loss; add --loss with --data"),
    ],
)
def test_mistakes_are_one_line_and_exit_status_2(tiny_path, argv, complaint, capsys):
    assert main(["eval", str(tiny_path), *argv]) == EXIT_WRONG_INPUT
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert complaint in line


def test_a_gate_of_other_specialists_is_refused_before_any_weight_is_loaded(tiny_path, cache, tmp_path, monkeypatch):
    path = tmp_path / "gate.safetensors"
    save_gate(build_gate("joint", ("text", "math", "code"), (64, 64, 64)), path, ("text", "math", "code"))
    monkeypatch.setattr(held_out, "load_rows", lambda *_, **__: pytest.fail("rows were read"))
    with pytest.raises(GateError, match=r"gate\.safetensors: specialists: the gate was made for"):
        task_of(tiny_path, cache, {"other": path})
