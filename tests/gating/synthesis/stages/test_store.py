"""What is written stays, whole and once, whatever ends the process that wrote it."""

import json
from pathlib import Path

import pytest

from ultrafuser.gating.errors import StoreError
from ultrafuser.gating.synthesis.stages.records import Item, Miss, Record, draw, identify, seed_of
from ultrafuser.gating.synthesis.stages.store import MANIFEST_FILE, MISSES_FILE, Store


def record(number: int, stage: str = "responses") -> Record:
    return Record(
        id=identify(stage, number),
        stage=stage,
        domain="text",
        parent="p",
        prompt="x-1",
        model="m",
        seed=1,
        items=(Item(id=identify(stage, number, 0), text=f"text {number}"),),
        prompt_tokens=3,
        completion_tokens=2,
        time=1.0,
    )


def miss(number: int, *, is_final: bool = True) -> Miss:
    return Miss(
        id=identify("responses", number),
        stage="responses",
        domain="text",
        reason="refusal",
        detail="I cannot",
        is_final=is_final,
        prompt_tokens=1,
        completion_tokens=1,
        time=1.0,
    )


def fill(folder: Path, count: int, **options: int) -> None:
    with Store(folder, **options) as store:
        for number in range(count):
            store.append(record(number))


def test_records_are_read_back_as_they_were_in_their_order(tmp_path):
    fill(tmp_path, 25, shard_lines=10)
    with Store(tmp_path) as store:
        assert list(store.records("responses")) == [record(number) for number in range(25)]
        assert store.ids("responses") == {record(number).id for number in range(25)}
        assert store.tokens == (75, 50)


def test_full_shards_are_closed_and_their_digests_kept(tmp_path):
    fill(tmp_path, 25, shard_lines=10)
    fill_more = Store(tmp_path, shard_lines=10)
    with fill_more as store:
        store.append(record(25))
    lines = {path.name: len(path.read_text().splitlines()) for path in (tmp_path / "responses").iterdir()}
    assert lines == {"00000.jsonl": 10, "00001.jsonl": 10, "00002.jsonl": 6}
    manifest = json.loads((tmp_path / MANIFEST_FILE).read_text())
    assert set(manifest["closed"]) == {"responses/00000.jsonl", "responses/00001.jsonl"}
    assert manifest["records"] == {"responses": 26}


@pytest.mark.parametrize("size", [1, 30, 200])
def test_a_last_line_that_was_not_finished_is_cut_off_and_made_again(tmp_path, size):
    fill(tmp_path, 3)
    shard = tmp_path / "responses" / "00000.jsonl"
    shard.write_bytes(shard.read_bytes()[:-size])
    with Store(tmp_path) as store:
        assert store.ids("responses") == {record(0).id, record(1).id}
        store.append(record(2))
    with Store(tmp_path) as store:
        assert [item.id for item in store.records("responses")] == [record(number).id for number in range(3)]


def test_an_id_is_never_written_twice(tmp_path):
    fill(tmp_path, 1)
    with Store(tmp_path) as store, pytest.raises(AssertionError, match="made twice"):
        store.append(record(0))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda text: text + text.splitlines()[0] + "\n", r"00000\.jsonl:4: .* is there twice; delete one"),
        (lambda text: text.replace('"model"', '"modle"', 1), r"00000\.jsonl:1: .*; delete the line to make it again"),
        (lambda text: "\n" + text, r"00000\.jsonl:1: Invalid JSON"),
    ],
)
def test_a_file_that_was_spoilt_is_named_with_its_line(tmp_path, change, complaint):
    fill(tmp_path, 3)
    shard = tmp_path / "responses" / "00000.jsonl"
    shard.write_text(change(shard.read_text()))
    with pytest.raises(StoreError, match=complaint):
        Store(tmp_path)


def test_a_closed_shard_that_changed_or_is_gone_is_refused(tmp_path):
    fill(tmp_path, 12, shard_lines=10)
    shard = tmp_path / "responses" / "00000.jsonl"
    content = shard.read_text()
    shard.write_text(content.replace("text 3", "text 4"))
    with pytest.raises(StoreError, match="was changed after it was closed"):
        Store(tmp_path)
    shard.unlink()
    with pytest.raises(StoreError, match="is gone; put it back"):
        Store(tmp_path)


def test_a_miss_is_kept_until_its_call_is_made(tmp_path):
    with Store(tmp_path) as store:
        store.append_miss(miss(0, is_final=False))
        store.append_miss(miss(0))
        store.append_miss(miss(1))
        store.append(record(1))
    with Store(tmp_path) as store:
        assert store.misses == (miss(0),)
        assert store.miss(record(1).id) is None
        assert store.tokens == (6, 5)
    assert len((tmp_path / MISSES_FILE).read_text().splitlines()) == 3


def test_ids_seeds_and_draws_come_from_the_lineage_alone():
    assert identify("a", 1) == identify("a", 1)
    assert len({identify("a", 1), identify("a", "1"), identify("a1"), identify("a", 1, "")}) == 4
    assert seed_of("x") == seed_of("x") < 2**31
    drawn = [draw(identify(number), "complicate") for number in range(4000)]
    assert abs(sum(value < 0.3 for value in drawn) / 4000 - 0.3) < 0.03
    assert draw("x", "one") != draw("x", "other")
