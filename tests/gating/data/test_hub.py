"""Data sets of the hub: what is asked of it, which rows come, and what is said where something is missing.

The hub is a stand-in; `huggingface_hub` and `datasets` are the real ones, in a process of their own.
"""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset

from tests.gating.data.hub_reader import HubReader, reading
from tests.gating.data.hub_server import COMMIT, OTHER_COMMIT, Hub, json_lines, serving_hub
from ultrafuser.gating.data.conversations import BadRow, Conversation, DataFile, read_conversations
from ultrafuser.gating.data.hub import open_data
from ultrafuser.gating.errors import DataError
from ultrafuser.gating.evaluation import command as evaluation
from ultrafuser.gating.files import file_digest
from ultrafuser.server.__main__ import EXIT_WRONG_INPUT, main

SUMS = "hub:org/sums,prompt=question,response=answer"


def sums(begin: int, end: int) -> bytes:
    pairs = [(f"What is {number} plus {number}?", f"{2 * number}.") for number in range(begin, end)]
    return json_lines([{"question": question, "answer": answer, "level": None} for question, answer in pairs])


def parquet(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    Dataset.from_list(rows).to_parquet(buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with serving_hub() as hub:
        hub.add(
            "org/sums", {f"data/train-0000{shard}.jsonl": sums(100 * shard, 100 * shard + 100) for shard in range(3)}
        )
        yield hub


@pytest.fixture(scope="module")
def read(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubReader]:
    folder = tmp_path_factory.mktemp("hub")
    # What stands where the process runs is not what a data set of this name is.
    (folder / "org" / "sums").mkdir(parents=True)
    (folder / "org" / "sums" / "train.jsonl").write_bytes(json_lines([{"question": "Local?", "answer": "Yes."}]))
    with reading(hub.environment(str(folder / "home")), folder) as reader:
        yield reader


def rows_of(files: list[DataFile] | str) -> list[dict[str, Any]]:
    assert isinstance(files, list), files
    return [json.loads(line) for file in files for line in file.path.read_text().splitlines()]


def line_of(answer: list[DataFile] | str) -> str:
    assert isinstance(answer, str)
    assert "\n" not in answer
    return answer


def test_a_limit_fetches_the_first_rows_and_leaves_the_other_files_alone(hub: Hub, read: HubReader, tmp_path: Path):
    hub.asked.clear()
    files = read(f"math={SUMS}", cache=tmp_path, limit=5)
    questions = [row["messages"][0]["content"] for row in rows_of(files)]
    assert questions == [f"What is {number} plus {number}?" for number in range(5)]
    got = {asked.rsplit("/", 1)[1] for asked in hub.asked if asked.startswith("GET /datasets/")}
    assert "train-00000.jsonl" in got
    assert got.isdisjoint({"train-00001.jsonl", "train-00002.jsonl"})
    assert len(rows_of(read(f"math={SUMS}", cache=tmp_path))) == 300


def test_rows_are_those_of_a_file_of_the_domain_named_after_the_commit(read: HubReader, tmp_path: Path):
    files = read(f"math={SUMS}", cache=tmp_path)
    assert isinstance(files, list)
    (file,) = files
    assert (file.name, file.domain) == (f"hub:org/sums@{COMMIT},prompt=question,response=answer", "math")
    rows = [row for _, row, _ in read_conversations(file)]
    assert len(rows) == 300
    assert not any(isinstance(row, BadRow) for row in rows)
    last = {"role": "assistant", "content": "598."}
    assert rows_of(files)[-1] == {"messages": [{"role": "user", "content": "What is 299 plus 299?"}, last]}


def test_what_was_fetched_is_fetched_once_and_by_its_commit_found_without_the_hub(
    hub: Hub, read: HubReader, tmp_path: Path
):
    pinned = f"math={SUMS.replace('org/sums', f'org/sums@{COMMIT}')}"
    first = read(f"math={SUMS}", cache=tmp_path)
    hub.asked.clear()
    assert read(f"math={SUMS}", cache=tmp_path) == first
    assert hub.asked == ["GET /api/datasets/org/sums/revision/main"]
    assert open_data([pinned], tmp_path) == first
    with reading({"HF_HUB_OFFLINE": "1"}, tmp_path) as offline:
        assert offline(pinned, cache=tmp_path) == first
        for argument in (f"math={SUMS}", pinned.replace(COMMIT, OTHER_COMMIT)):
            assert "cannot be fetched, as HF_HUB_OFFLINE is set; fetch it without" in line_of(
                offline(argument, cache=tmp_path)
            )


def test_a_branch_that_moves_gives_the_rows_of_its_new_commit(hub: Hub, read: HubReader, tmp_path: Path):
    hub.add("org/moving", {"train.jsonl": sums(0, 2)})
    argument = f"math={SUMS.replace('sums', 'moving')}"
    before = read(argument, cache=tmp_path)
    hub.add("org/moving", {"train.jsonl": sums(0, 3)}, OTHER_COMMIT)
    after = read(argument, cache=tmp_path)
    assert [len(rows_of(files)) for files in (before, after)] == [2, 3]
    assert isinstance(after, list)
    assert after[0].name.startswith(f"hub:org/moving@{OTHER_COMMIT}")
    assert read(argument.replace("moving", f"moving@{COMMIT}"), cache=tmp_path) == before


def test_messages_of_a_config_and_a_split_with_their_own_domains(hub: Hub, read: HubReader, tmp_path: Path):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho", "reasoning": "hm"}]
    rows = [{"turns": chat, "domain": name, "picture": b"x"} for name in ("text", "code", "text")]
    card = "---\nconfigs:\n- config_name: other\n  data_files: none.parquet\n- config_name: chat\n  data_files:\n"
    card += "  - split: held_out\n    path: chat/*.parquet\n---\n"
    other = parquet([{"a": 1}])
    hub.add("org/chat", {"README.md": card.encode(), "chat/a.parquet": parquet(rows), "none.parquet": other})
    files = read("hub:org/chat,config=chat,split=held_out,messages=turns", cache=tmp_path, limit=1)
    found = rows_of(files)
    assert [row["domain"] for row in found] == ["text", "code", "text"], "a limit is one of rows of a domain"
    assert found[0]["messages"] == chat, "without the thought of the user that Arrow has"
    assert isinstance(files, list)
    assert [row.domain for _, row, _ in read_conversations(files[0])] == ["text", "code", "text"]
    assert "Config name is missing" in (line := line_of(read("hub:org/chat,messages=turns", cache=tmp_path)))
    assert "chat" in line.split("available configs", 1)[1]


def test_sharegpts_messages_are_read_and_rows_that_fit_nothing_are_bad_rows(hub: Hub, read: HubReader, tmp_path: Path):
    pair = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    rows = [{"conversations": own} for own in (pair, [{"from": "human", "value": "Hi"}], None)]
    hub.add("org/share", {"train.jsonl": json_lines(rows)})
    files = read("text=hub:org/share,messages=conversations", cache=tmp_path)
    assert isinstance(files, list)
    good, *bad = [row for _, row, _ in read_conversations(files[0])]
    assert isinstance(good, Conversation)
    assert good.messages == [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    assert [str(row).rsplit(": ", 1)[1] for row in bad] == [
        "must end with an assistant message, ends with user",
        "must be a list of at least two messages",
    ]
    assert str(bad[0]).startswith(f"hub:org/share@{COMMIT},messages=conversations:2: messages")


@pytest.mark.parametrize(
    ("argument", "complaint"),
    [
        ("math=hub:org/sums", "no column 'messages', there are question, answer, level; name one that is there"),
        (
            "math=hub:org/sums,prompt=question,response=solution",
            "no column 'solution', there are question, answer, lev",
        ),
        (SUMS, "no column 'domain', there are question, answer, level; name the domain, DOMAIN=hub:..."),
        ("math=hub:org/none", "hub:org/none@main: no such data set, or a private one; correct the name, or set HF_"),
        ("math=hub:org/sums@v9", "hub:org/sums@v9: no such revision; name a branch, a tag or a commit of it"),
        ("math=hub:org/closed", "hub:org/closed@main: its owner has to let you in"),
        (f"math={SUMS},split=test", "Bad split: test. Available splits: ['train']"),
        ("math=hub:org/empty", "doesn't contain any data files"),
    ],
)
def test_what_is_missing_is_one_line_before_any_rows_are_fetched(
    argument: str, complaint: str, hub: Hub, read: HubReader, tmp_path: Path
):
    hub.add("org/closed", {})
    hub.add("org/empty", {"README.md": b"Nothing.\n"})
    hub.gated = frozenset({"org/closed"})
    assert complaint in line_of(read(f"text={SUMS}", argument, cache=tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_hub_that_is_gone_is_one_line(tmp_path: Path):
    with serving_hub() as hub:
        gone = hub.environment(str(tmp_path))
    with reading(gone, tmp_path) as read:
        assert "hub:org/sums@main: cannot be read from the hub (" in line_of(read(f"math={SUMS}", cache=tmp_path))


@pytest.mark.parametrize(
    ("argument", "complaint"),
    [
        ("hub:sums", "'sums' is no name of a data set"),
        ("hub:../sums", "'../sums' is no name of a data set"),
        ("a=hub:org/sums@", "'org/sums@' is no name of a data set"),
        ("hub:org/sums,column=text", "'column' is unknown, there twice, or without a value"),
        ("hub:org/sums,split=a,split=b", "'split' is unknown, there twice, or without a value"),
        ("hub:org/sums,messages", "'messages' is unknown, there twice, or without a value"),
        ("hub:org/sums,prompt=text", "name one column of messages, or two: prompt and response"),
        ("hub:org/sums,messages=a,prompt=b,response=c", "name one column of messages, or two: prompt and response"),
        ("hub:org/sums,split=../x", "split: '../x' is no name"),
        ("mean=hub:org/sums", "domain: 'mean' is the name of a result of all domains"),
    ],
)
def test_a_name_in_another_form_is_one_line_and_nothing_is_asked(argument: str, complaint: str, tmp_path: Path):
    with pytest.raises(DataError) as caught:
        open_data([argument], tmp_path)
    assert complaint in str(caught.value)


def test_training_notes_the_commit_and_the_digest_of_the_rows(read: HubReader, tmp_path: Path, run, tiny_path: Path):
    argument = f"math={SUMS.replace('sums', f'sums@{COMMIT}')}"
    files = read(argument, cache=tmp_path / "cache", limit=6)
    assert isinstance(files, list)
    options = {"data": [argument], "limit": 6, "cache": str(tmp_path / "cache"), "specialist": "math"}
    path = run(**options, steps=1)
    manifest = json.loads((path.parent / "manifest.json").read_text())
    assert manifest["data_sha256"] == {files[0].name: file_digest(files[0].path)}
    assert COMMIT in files[0].name
    run(**options, steps=1, resume=True)


def test_evaluation_and_analysis_read_the_hub_too(
    read: HubReader, tmp_path: Path, tiny_path: Path, capsys: pytest.CaptureFixture[str]
):
    argument = f"math={SUMS.replace('sums', f'sums@{COMMIT}')}"
    read(argument, cache=tmp_path / "cache", limit=2)
    common = [str(tiny_path), "--data", argument, "--limit", "2", "--cache", str(tmp_path / "cache")]
    assert evaluation.run([*common, "--loss"]) == 0
    assert "math: 2 rows" in capsys.readouterr().err
    assert main(["analyze", *common, "--output", str(tmp_path / "shown")]) == 0
    assert (tmp_path / "shown" / "weights.json").exists()
    assert main(["eval", str(tiny_path), "--loss", "--data", "hub:x", *common[3:]]) == EXIT_WRONG_INPUT


def test_what_datasets_finds_in_its_own_cache_instead_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """When the hub fails, `datasets` goes on with whatever commit it has seen before."""
    monkeypatch.setattr("datasets.load_dataset_builder", lambda *_, **__: SimpleNamespace(hash=OTHER_COMMIT))
    with pytest.raises(DataError, match=rf"hub:org/sums@{COMMIT}.*: cannot be fetched now; try again$"):
        open_data([f"math={SUMS.replace('sums', f'sums@{COMMIT}')}"], tmp_path)
    assert not list(tmp_path.iterdir())
