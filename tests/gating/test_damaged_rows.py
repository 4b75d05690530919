"""Hundreds of damaged files for every reader of rows: each is read, or is one line that says where; never a traceback.

Drawn from a fixed seed, so that what fails once fails always.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.gating.damage import write_damaged
from tests.gating.evaluation.examples import ROWS
from ultrafuser.gating.analysis.runs import read_runs
from ultrafuser.gating.commands.run_folder import keep_settings
from ultrafuser.gating.data.conversations import BadRow, DataFile, read_conversations
from ultrafuser.gating.data.decontamination import Index, TestSet
from ultrafuser.gating.data.encoded_rows import load_rows
from ultrafuser.gating.data.encoding import make_encoder
from ultrafuser.gating.errors import UserError
from ultrafuser.gating.evaluation.benchmarks.answers import AnswersFile
from ultrafuser.gating.evaluation.benchmarks.benchmarks import BENCHMARKS, BenchmarkFile
from ultrafuser.gating.evaluation.benchmarks.items import Answer, Item
from ultrafuser.gating.evaluation.benchmarks.scoring import judge_all
from ultrafuser.gating.evaluation.benchmarks.sources import load_items
from ultrafuser.gating.model.fusion import inspect_fusion, load_fusion
from ultrafuser.gating.synthesis.dataset.training_rows import conversations
from ultrafuser.gating.synthesis.stages.store import Store

CONVERSATION = {
    "domain": "text",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Say a."},
        {"role": "assistant", "content": "a"},
    ],
    "id": 7,
}
ANSWER = {
    "id": "1", "texts": ["The answer is B."], "finish_reasons": ["stop"], "top_logprobs": [["Yes", -0.5], ["No", -1.0]],
    "error": None, "is_final": True, "time": 1.5,
}  # fmt: skip
RECORD = {
    "id": "a", "stage": "responses", "domain": "text", "parent": "p", "root": "r", "prompt": "x-1", "model": "m",
    "seed": 1, "messages": [{"role": "user", "content": "Say a."}], "items": [{"id": "i", "text": "a"}],
    "prompt_tokens": 3, "completion_tokens": 2, "time": 1.0,
}  # fmt: skip
RUN = {"history": [{"step": 1, "loss": 3.0}, {"step": 2, "eval_loss": 2.0, "eval_loss_a": 2.0, "eval_gate_a_b": 0.5}]}
SETTINGS = {"domains": ["text"], "turns": 0, "seed": 1}


def holds(read: Callable[[], object]) -> bool:
    """Whether a file could be read; if not, that its one error is a line that can be printed."""
    try:
        read()
    except UserError as error:
        text = str(error)
        assert "\n" not in text, text
        assert len(text.encode()) < 1000, text
        return False
    return True


def share_read(path: Path, rows: Sequence[Any], read: Callable[[Path], object], count: int) -> float:
    """How many of so many damaged files could be read."""
    random = Random(f"{path.name}:{count}")
    read_ones = 0
    for _ in range(count):
        write_damaged(path, list(rows), random)
        read_ones += holds(lambda: read(path))
    return read_ones / count


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_conversations(name: str, tmp_path: Path) -> None:
    def read(path: Path) -> None:
        for _, row, _ in read_conversations(DataFile.parse(str(path))):
            if isinstance(row, BadRow):
                holds(lambda row=row: (_ for _ in ()).throw(UserError(str(row))))  # type: ignore[misc]
            else:
                str(row).encode()

    assert share_read(tmp_path / name, [CONVERSATION] * 3, read, 200) > 0.5


def test_conversations_that_are_encoded(tiny_path: Path, tmp_path: Path) -> None:
    fusion = load_fusion(tiny_path)
    encoder, key = make_encoder(fusion, inspect_fusion(fusion), 500)

    def read(path: Path) -> None:
        rows = load_rows([DataFile.parse(str(path))], encoder, key=key, cache_dir=tmp_path / "cache")
        "".join(rows.summary()).encode()

    assert share_read(tmp_path / "rows.jsonl", [CONVERSATION] * 3, read, 40) > 0.5


@pytest.mark.parametrize("name", list(ROWS))
def test_benchmarks(name: str, tmp_path: Path) -> None:
    benchmark = BENCHMARKS[name]

    def answer(item: Item) -> list[Answer]:
        return [
            Answer(request.id, ("It is 1. The answer is B.",), ("stop",), None, None, True, 1.0)
            for request in item.requests
        ]

    def read(path: Path) -> None:
        path = BenchmarkFile.parse(f"{name}={path}").path or path
        answered = [(item, answer(item)) for item in load_items(benchmark, path, chain_of_thought=False)]
        if benchmark.export is not None:
            benchmark.export(tmp_path, "m", answered)
        elif not benchmark.executes_code:
            judge_all(benchmark, answered, lambda: None)

    rows = ROWS[name][:3]
    assert 0 < share_read(tmp_path / "rows.jsonl", rows, read, 80) < 1
    assert share_read(tmp_path / "rows.jsonl.gz", rows, read, 40) < 1


def test_test_sets(tmp_path: Path) -> None:
    def read(path: Path) -> None:
        Index([TestSet.parse(f"own={path}")]).find("How many eggs are in 3 boxes?")

    assert share_read(tmp_path / "rows.jsonl", ROWS["svamp"] + ROWS["truthfulqa"], read, 200) > 0.3


def test_answers(tmp_path: Path) -> None:
    item = load_items(BENCHMARKS["aqua"], _written(tmp_path, ROWS["aqua"]), chain_of_thought=False)[0]

    def read(path: Path) -> None:
        with AnswersFile(path) as answers:
            if not answers.missing(item.requests):
                judge_all(BENCHMARKS["aqua"], [(item, answers.of(item))], lambda: None)

    assert 0 < share_read(tmp_path / "answers.jsonl", [ANSWER], read, 200) < 1


def test_records(tmp_path: Path) -> None:
    def read(path: Path) -> None:
        with Store(tmp_path) as store:
            list(conversations(store, 0))

    (tmp_path / "responses").mkdir()
    rows = [RECORD, {**RECORD, "id": "b", "root": "s"}]
    assert 0 < share_read(tmp_path / "responses" / "00000.jsonl", rows, read, 150) < 1


def test_logs_of_runs(tmp_path: Path) -> None:
    def read(path: Path) -> None:
        assert read_runs([str(tmp_path)])[0].label

    assert 0 < share_read(tmp_path / "manifest.json", [RUN], read, 200) < 1


def test_settings_of_runs(tmp_path: Path) -> None:
    def read(path: Path) -> None:
        keep_settings(tmp_path, SETTINGS)

    assert 0 < share_read(tmp_path / "settings.json", [SETTINGS], read, 200) < 1


def _written(folder: Path, rows: Sequence[Any]) -> Path:
    path = folder / "items.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path
