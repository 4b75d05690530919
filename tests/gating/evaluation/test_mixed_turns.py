"""Conversations whose turns change their domain: how they are made, and what is taken of them."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.fakes import build_gate, write_tiny_fusion
from tests.gating.examples import CONVERSATIONS
from ultrafuser.gating.data.batches import collate_rows
from ultrafuser.gating.data.conversations import DataFile
from ultrafuser.gating.errors import CommandError
from ultrafuser.gating.evaluation.held_out import ReadingOptions, ReadingTask, prepare_task
from ultrafuser.gating.evaluation.mixed_turns import describe_turns, join_turns, measure_turns
from ultrafuser.gating.model.gate_file import save_gate
from ultrafuser.gating.model.reference import UltraFuserForCausalLM
from ultrafuser.server.__main__ import EXIT_WRONG_INPUT, main

NAMES = ("text", "code", "math")
QUIET = lambda label, share: None  # noqa: E731


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> ReadingOptions:
    return ReadingOptions(cache_dir=tmp_path_factory.mktemp("cache"), precision="float32")


def joined(options: ReadingOptions, count: int = 12, names: tuple[str, ...] = NAMES) -> DataFile:
    return join_turns([DataFile.parse(str(CONVERSATIONS))], names, count, options, QUIET)


def rows_of(file: DataFile) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.path.read_text().splitlines()]


def task_of(path: Path, options: ReadingOptions, gates: dict[str, Path] | None = None) -> ReadingTask:
    return prepare_task(str(path), [joined(options)], options, QUIET, gates or {})


def test_every_conversation_joins_the_first_exchanges_of_two_domains(options):
    exchanges = {}
    for line in CONVERSATIONS.read_text().splitlines():
        row = json.loads(line)
        first = next(index for index, own in enumerate(row["messages"]) if own["role"] == "assistant")
        exchanges[row["messages"][first]["content"]] = (row["domain"], row["messages"][first - 1]["content"])
    rows = rows_of(joined(options))
    assert Counter(row["domain"] for row in rows) == {
        f"{first}, then {second}": 2 for first in NAMES for second in NAMES if first != second
    }
    for row in rows:
        assert [own["role"] for own in row["messages"]] == ["user", "assistant", "user", "assistant"]
        found = [exchanges[row["messages"][index]["content"]] for index in (1, 3)]
        assert f"{found[0][0]}, then {found[1][0]}" == row["domain"]
        assert [question for _, question in found] == [row["messages"][index]["content"] for index in (0, 2)]
    used = Counter(row["messages"][index]["content"] for row in rows for index in (1, 3))
    assert set(used.values()) == {1}, "24 turns of 30 rows: none twice"


def test_the_seed_alone_decides_which(options, tmp_path):
    elsewhere = replace(options, cache_dir=tmp_path / "other")
    assert rows_of(joined(elsewhere)) == rows_of(joined(options))
    assert rows_of(joined(replace(options, seed=1))) != rows_of(joined(options))
    assert rows_of(joined(options, count=6)) == rows_of(joined(options))[:6]


def test_the_oracle_is_each_turns_own_specialist_and_the_others_are_the_references(tiny_path, options, tmp_path):
    path = tmp_path / "gate.safetensors"
    save_gate(build_gate("smoothed", NAMES, (64, 64, 64)), path, NAMES)
    task = task_of(tiny_path, options, {"soft": path})
    table = measure_turns(task)
    assert set(table.sums) == {*NAMES, "uniform", "fused", "gate:soft", "oracle"}
    soft = UltraFuserForCausalLM.from_fusion(task.loaded.model_copy(update={"gate": str(path)}))
    alone = [UltraFuserForCausalLM.from_fusion(task.loaded.alone(task.loaded.specialists[index])) for index in range(3)]
    sums, tokens = np.zeros((2, 2)), np.zeros(2)
    for row in task.rows.dataset:
        batch = collate_rows([row])
        labels = batch.pop("labels")
        # A response ends with its EOS.
        end = int((labels == 2).nonzero()[0, 0]) + 1
        for turn, (own, places) in enumerate(
            zip(row["domain"].split(", then "), (slice(end), slice(end, None)), strict=True)
        ):
            index = NAMES.index(own)
            with torch.no_grad():
                outputs = (
                    alone[index](**{name: tensors[index : index + 1] for name, tensors in batch.items()}),
                    soft(**batch),
                )
            for place, output in enumerate(outputs):
                sums[place, turn] += float(
                    # Alone a specialist has ids of its own, too.
                    torch.nn.functional.cross_entropy(output.logits[0, places, :320], labels[places], reduction="sum")
                )
            tokens[turn] += len(labels[places])
    for place, name in enumerate(("oracle", "gate:soft")):
        found = [table.loss(name, where) for where in ("turn 1", "turn 2", "both")]
        wanted = [*(sums[place] / tokens), sums[place].sum() / tokens.sum()]
        assert found == pytest.approx(wanted, abs=2e-4)
    assert table.loss("oracle", "turn 2") != pytest.approx(table.loss("fused", "turn 2"), abs=0.1)


def test_a_conversation_whose_second_turn_does_not_fit_is_left_out(tiny_path, options):
    lengths = task_of(tiny_path, options).rows.dataset["length"][:]
    task = task_of(tiny_path, replace(options, max_length=min(lengths)))
    table = measure_turns(task)
    assert 0 < len(table.tokens["both"]) < len(task.rows)
    assert all(len(own) == len(table.tokens["both"]) for own in table.tokens.values())
    assert min(table.tokens["turn 2"]) > 0
    assert f"{len(table.tokens['both'])} conversations of two turns" in describe_turns(table)[-1]


def test_the_command_prints_the_turns_and_writes_them_as_json(tiny_path, options, tmp_path, capsys):
    argv = ["eval", str(tiny_path), "--loss", "--data", str(CONVERSATIONS), "--limit", "2", "--mixed-turns", "12"]
    assert main([*argv, "--cache", str(options.cache_dir), "--json", str(tmp_path / "loss.json")]) == 0
    found = json.loads((tmp_path / "loss.json").read_text())["mixed_turns"]
    assert list(found) == [*NAMES, "uniform", "fused", "oracle"]
    assert found["oracle"]["against_oracle"]["both"] == [0, 0, 0]
    fused = found["fused"]
    assert fused["against_oracle"]["turn 2"][0] == pytest.approx(
        fused["loss"]["turn 2"][0] / found["oracle"]["loss"]["turn 2"][0] - 1
    )
    out = capsys.readouterr().out
    assert "| nats per response token | turn 1 | turn 2 | both |" in out
    assert f"| oracle | {found['oracle']['loss']['turn 1'][0]:.4f} |" in out
    assert "12 conversations of two turns of different domains" in out


def test_domains_that_are_no_specialists_are_refused_before_models_are_prepared(tmp_path, options, monkeypatch, capsys):
    path = write_tiny_fusion(tmp_path, names=("text", "law", "math"))
    monkeypatch.setattr(
        "ultrafuser.gating.evaluation.held_out.materialize", lambda *_: pytest.fail("a model was prepared")
    )
    argv = ["eval", str(path), "--loss", "--data", str(CONVERSATIONS), "--mixed-turns", "12"]
    assert main([*argv, "--cache", str(options.cache_dir)]) == EXIT_WRONG_INPUT
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "--mixed-turns: domain 'code' is no specialist; give rows of two or more of the domains text, law" in line


def test_one_domain_alone_and_a_specialist_called_as_a_row_are_refused(tmp_path, options):
    (tmp_path / "rows.jsonl").write_text(CONVERSATIONS.read_text())
    one = DataFile(tmp_path / "rows.jsonl", "code")
    with pytest.raises(CommandError, match="--mixed-turns: there are rows of one domain only; give rows of two"):
        join_turns([one], NAMES, 3, options, QUIET)
    with pytest.raises(CommandError, match="'oracle' is the name of a row of the table; rename the specialist"):
        joined(options, names=("oracle", "code"))
