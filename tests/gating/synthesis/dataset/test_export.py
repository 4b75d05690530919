"""What is exported is the training format, loads as a Hugging Face data set, and holds no test question."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from tests.gating.evaluation.endpoint import Reply
from tests.gating.synthesis.model import answer, schema_of, serving_model
from tests.gating.synthesis.runs import run, settings_of
from ultrafuser.gating.data.conversations import Conversation, DataFile, read_conversations
from ultrafuser.gating.data.decontamination import Hit, Index, TestSet
from ultrafuser.gating.errors import DataError
from ultrafuser.gating.synthesis.dataset.export import export
from ultrafuser.gating.synthesis.settings import ExportSettings
from ultrafuser.gating.training.command import train
from ultrafuser.gating.training.settings import TrainSettings
from ultrafuser.server.__main__ import EXIT_WRONG_INPUT, main


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with further turns; copied by who changes it."""
    folder = tmp_path_factory.mktemp("made")
    with serving_model() as endpoint:
        run(settings_of(folder, endpoint, turns=2, turn_share=0.5))
    return folder


def rows_of(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    lines = gzip.decompress((folder / "dataset" / "data" / f"{split}.jsonl.gz").read_bytes()).decode().splitlines()
    return [json.loads(line) for line in lines]


def write_test_set(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return f"bench={path}"


def test_every_instruction_becomes_one_row_at_its_greatest_length(made):
    export(ExportSettings(output=str(made)))
    rows = rows_of(made)
    assert len(rows) == len({row["id"] for row in rows}) == 48
    assert {len(row["messages"]) for row in rows} == {2, 4, 6}
    assert {row["relation"] for row in rows} == {"", "strong", "weak"}
    assert {row["model"] for row in rows} == {"scripted"}


def test_the_training_data_loader_takes_every_row(made):
    export(ExportSettings(output=str(made)))
    file = DataFile.parse(str(made / "dataset" / "data" / "train.jsonl.gz"))
    read = [row for _, row, _ in read_conversations(file)]
    assert all(isinstance(row, Conversation) for row in read)
    assert {row.domain for row in read} == {"text", "code"}


def test_training_runs_on_what_was_exported(made, tmp_path, tiny_path, train_cache):
    export(ExportSettings(output=str(made)))
    settings = TrainSettings(
        fusion=str(tiny_path),
        data=(str(made / "dataset" / "data" / "train.jsonl.gz"),),
        output=str(tmp_path / "out"),
        stage=1,
        steps=1,
        rows_per_domain=1,
        cache=str(train_cache),
        precision="float32",
    )
    assert train(settings) == tmp_path / "out" / "fusion.yaml"


def test_hugging_face_datasets_loads_the_folder_and_both_splits(made, tmp_path):
    from datasets import load_dataset

    target = export(ExportSettings(output=str(made), validation_share=0.3))
    loaded = load_dataset(str(target), cache_dir=str(tmp_path))
    assert set(loaded) == {"train", "validation"}
    assert loaded["train"].num_rows + loaded["validation"].num_rows == 48
    assert loaded["train"][0]["messages"][0]["role"] == "user"
    topics = [{row["sub_topic"] for row in rows_of(made, split)} for split in ("train", "validation")]
    assert topics[0].isdisjoint(topics[1])
    export(ExportSettings(output=str(made)))
    assert not (target / "data" / "validation.jsonl.gz").exists()


def test_two_exports_of_the_same_run_are_equal_bytes(made):
    path = made / "dataset" / "data" / "train.jsonl.gz"
    contents = []
    for _ in range(2):
        export(ExportSettings(output=str(made)))
        contents.append(path.read_bytes())
    assert contents[0] == contents[1]


def test_rows_that_share_a_run_with_a_test_set_are_left_out_and_reported(made, tmp_path):
    export(ExportSettings(output=str(made)))
    rows = rows_of(made)
    question = " ".join(rows[0]["messages"][0]["content"].split())
    long_run = " ".join(rows[1]["messages"][1]["content"].split()[5:18])
    assert (len(question.split()), len(long_run.split())) == (12, 13)
    bench = write_test_set(
        tmp_path / "bench.jsonl",
        {"task": 1, "question": f"{question.upper()}!", "note": "too short to count"},
        {"task": 2, "options": {"a": f"Before. {long_run}, after."}},
    )
    export(ExportSettings(output=str(made), test_set=(bench,)))
    report = json.loads((made / "dataset" / "decontamination.json").read_text())
    assert {hit["id"]: hit["line"] for hit in report["dropped"]} == {rows[0]["id"]: 1, rows[1]["id"]: 2}
    assert {row["id"] for row in rows_of(made)} == {row["id"] for row in rows[2:]}
    card = (made / "dataset" / "README.md").read_text()
    assert "contaminated by bench: " in card
    assert "bench (SHA-256 " in card


def test_a_run_of_twelve_words_of_a_longer_text_is_no_contamination(tmp_path):
    text = "one two three four five six seven eight nine ten eleven twelve thirteen"
    index = Index([TestSet.parse(write_test_set(tmp_path / "b.jsonl", {"question": text}))])
    assert index.find(text.replace("thirteen", "fourteen")) is None
    assert index.find(f"zero {text.title()}.") == Hit("bench", 1, text)


def test_conversations_that_begin_alike_are_exported_once(tmp_path):
    """Two rewritten instructions may come out the same; nothing looks at them before."""

    def same(body: dict[str, Any], before: int) -> Reply | None:
        schema = schema_of(body)
        is_rewriting = schema is not None and "instruction" in schema["properties"]
        return Reply('{"instruction": "Say why this is so, and prove it."}') if is_rewriting else answer(body)

    with serving_model(same) as endpoint:
        run(settings_of(tmp_path, endpoint))
    export(ExportSettings(output=str(tmp_path)))
    dropped = json.loads((tmp_path / "dataset" / "statistics.json").read_text())["dropped"]
    assert sum(row["is_complex"] for row in rows_of(tmp_path)) == 1
    assert sum(reasons["duplicate"] for reasons in dropped.values()) == 48 - len(rows_of(tmp_path)) > 0


def test_statistics_count_what_is_there(made, tiny_path):
    export(ExportSettings(output=str(made), tokenizer=str(tiny_path.parent / "text")))
    statistics = json.loads((made / "dataset" / "statistics.json").read_text())["splits"]["train"]
    assert statistics.keys() == {"text", "code"}
    text, rows = statistics["text"], [row for row in rows_of(made) if row["domain"] == "text"]
    assert (text["conversations"], text["meta_topics"], text["sub_topics"]) == (24, 2, 4)
    assert text["mean_turns"] == sum(len(row["messages"]) for row in rows) / 2 / 24
    characters = sum(len(message["content"]) for row in rows for message in row["messages"]) / 24
    assert characters / 2.5 < text["mean_tokens"] <= characters
    assert "| text | 24 | 2 | 4 |" in (made / "dataset" / "README.md").read_text()
    export(ExportSettings(output=str(made)))
    words = sum(len(message["content"].split()) for row in rows for message in row["messages"]) / 24
    statistics = json.loads((made / "dataset" / "statistics.json").read_text())["splits"]["train"]
    assert statistics["text"]["mean_words"] == pytest.approx(words)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [("{", "bench.jsonl:1: not JSON"), ('{"q": "too short"}', "bench.jsonl: has no text of 6 words")],
)
def test_a_test_set_that_cannot_be_read_is_told(made, tmp_path, content, complaint):
    path = tmp_path / "bench.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=complaint):
        export(ExportSettings(output=str(made), test_set=(str(path),)))


def test_mistakes_are_one_line(tmp_path, capsys):
    for argv, complaint in [
        (["export", str(tmp_path)], "no folder of `ultrafuser data make`"),
        (["export", str(tmp_path), "--test-set", "none"], "no folder of"),
        (["map", str(tmp_path), "--fusion", "demo"], "no data set; run `ultrafuser data export"),
        (["draw"], "draw: no such command; one of make, export, map, clean"),
    ]:
        assert main(["data", *argv]) == EXIT_WRONG_INPUT
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert complaint in line
