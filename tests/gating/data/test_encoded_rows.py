"""Files of conversations: what is read, what is refused with which words, and that it happens once."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.gating.examples import CONVERSATIONS
from ultrafuser.gating.data.conversations import DataFile, check_row
from ultrafuser.gating.data.encoded_rows import Rows, load_rows, select
from ultrafuser.gating.data.encoding import ConversationEncoder
from ultrafuser.gating.errors import DataError
from ultrafuser.gating.model.fusion import load_fusion


@pytest.fixture(scope="module")
def encoder(tiny_path: Path) -> ConversationEncoder:
    fusion = load_fusion(tiny_path)
    tokenizers = [AutoTokenizer.from_pretrained(item.model) for item in fusion.specialists]
    return ConversationEncoder(fusion, tokenizers, num_shared_ids=320, max_length=1024)


def row(domain: str | None = "text", question: str = "Hi", answer: Any = "Hello", **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"domain": domain, "messages": messages, **more} if domain else {"messages": messages, **more}


def write(path: Path, rows: Sequence[Any]) -> DataFile:
    lines = [item if isinstance(item, bytes) else json.dumps(item).encode() for item in rows]
    content = b"".join(line + b"\n" for line in lines)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return DataFile.parse(str(path))


def load(files: Sequence[DataFile], encoder: ConversationEncoder, cache: Path, **more: Any) -> Rows:
    return load_rows(files, encoder, key={}, cache_dir=cache, **more)


def test_several_files_plain_and_gzipped_become_rows_of_their_domains(encoder, tmp_path):
    first = write(tmp_path / "a.jsonl", [row("text"), row("code", answer="pass")])
    second = write(tmp_path / "b.jsonl.gz", [row("code", answer="return 1"), row("math", answer="5")])
    rows = load([first, second], encoder, tmp_path / "cache")
    assert rows.dataset["domain"][:] == ["text", "code", "code", "math"]
    assert rows.domains == ("code", "math", "text")
    assert rows.indices("code") == [1, 2]
    assert rows.bad == ()
    assert sorted(rows.digests) == ["a.jsonl", "b.jsonl.gz"]


def test_the_examples_give_ten_rows_of_each_domain_with_masks_for_three_specialists(encoder, tmp_path):
    rows = load([DataFile.parse(str(CONVERSATIONS))], encoder, tmp_path)
    assert {domain: len(rows.indices(domain)) for domain in rows.domains} == {"code": 10, "math": 10, "text": 10}
    for item in rows.dataset:
        counts = [sum(mask) for mask in item["response_mask"]]
        assert counts == [item["num_response_tokens"]] * 3


def test_a_file_can_be_given_a_domain_which_wins_over_the_rows_own(encoder, tmp_path):
    write(tmp_path / "a.jsonl", [row(None), row("text")])
    rows = load([DataFile.parse(f"law={tmp_path / 'a.jsonl'}")], encoder, tmp_path / "cache")
    assert rows.dataset["domain"][:] == ["law", "law"]


def test_bad_rows_are_left_out_and_reported_with_file_line_and_reason(encoder, tmp_path):
    user, system = {"role": "user", "content": "Hi"}, {"role": "system", "content": "x"}
    answer = {"role": "assistant", "content": "Hello"}
    file = write(
        tmp_path / "mixed.jsonl",
        [
            row(),
            b"{not json",
            b"",
            ["a list"],
            row(None),
            row(7),  # type: ignore[arg-type]
            {"domain": "text", "messages": []},
            {"domain": "text", "messages": [user]},
            {"domain": "text", "messages": [system, answer]},
            {"domain": "text", "messages": [user, {"role": "robot", "content": "x"}]},
            row(answer="  "),
            row(answer=None),
            {"domain": "text", "messages": [user, {**answer, "tool_calls": [{"id": "1"}]}]},
            row(tools=[{"type": "function"}]),
            b'{"domain": "text", "messages": "\xff"}',
            row(question="x" * 1100),
        ],
    )
    rows = load([file], encoder, tmp_path / "cache")
    assert len(rows) == 1
    found = {bad.line: bad.reason for bad in rows.bad}
    assert list(found) == [2, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]
    wanted = [
        "not JSON", "not a JSON object", "domain: missing", "domain: must be a name, is 7", "at least two messages",
        "ends with user", "messages.1: an assistant message must follow a user message", "messages.1.role: is 'robot'",
        "messages.1.content: must be text", "messages.1.content: must be text", "messages.1.tool_calls", "tools:",
        "not UTF-8", "leaves no room for a response within 1024",
    ]  # fmt: skip
    for reason, words in zip(found.values(), wanted, strict=True):
        assert words in reason
    assert str(rows.bad[0]).startswith("mixed.jsonl:2: not JSON")
    assert rows.summary()[-1].startswith("14 bad rows left out, the first: mixed.jsonl:2: not JSON")


def test_a_domain_whose_rows_are_all_bad_is_an_error(encoder, tmp_path):
    file = write(tmp_path / "a.jsonl", [row("text"), row("code", answer="")])
    with pytest.raises(
        DataError, match=r"domain 'code': has no usable rows \(all 1 are bad, the first: a.jsonl:2: mess"
    ):
        load([file], encoder, tmp_path / "cache")


def test_a_domain_that_is_asked_for_and_not_there_is_an_error(encoder, tmp_path):
    file = write(tmp_path / "a.jsonl", [row("text")])
    with pytest.raises(DataError, match=r"domain 'math': has no usable rows \(the files have text\); add rows of it"):
        load([file], encoder, tmp_path / "cache", domains=["text", "math"])


def test_no_rows_at_all_is_an_error(encoder, tmp_path):
    file = write(tmp_path / "a.jsonl", [b"nothing"])
    with pytest.raises(DataError, match=r"no usable rows \(1 bad ones, the first: a.jsonl:1: not JSON"):
        load([file], encoder, tmp_path / "cache")


def test_two_files_of_one_name_are_two_files(encoder, tmp_path):
    files = []
    for index, domain in enumerate(("text", "code")):
        (tmp_path / domain).mkdir()
        files.append(write(tmp_path / domain / "train.jsonl", [row(domain)] * (index + 1)))
    rows = load(files, encoder, tmp_path / "cache")
    assert rows.dataset["domain"][:] == ["text", "code", "code"]
    assert len(rows.digests) == 2


def test_a_missing_file_and_one_that_is_no_gzip_are_errors(encoder, tmp_path):
    with pytest.raises(DataError, match="no such data file"):
        DataFile.parse(f"text={tmp_path / 'none.jsonl'}")
    (tmp_path / "a.jsonl.gz").write_bytes(b"plain text")
    with pytest.raises(DataError, match=r"a\.jsonl\.gz:\d+: not a whole gzip file"):
        load([DataFile.parse(str(tmp_path / "a.jsonl.gz"))], encoder, tmp_path / "cache")


def test_rows_are_encoded_once_and_again_when_the_file_changes(encoder, tmp_path):
    steps: list[str] = []
    for rows, num_encoded in (([row()], 1), ([row()], 1), ([row(), row()], 2)):
        file = write(tmp_path / "a.jsonl", rows)
        loaded = load([file], encoder, tmp_path / "cache", on_progress=lambda label, share: steps.append(str(share)))
        assert len(loaded) == len(rows)
        assert steps.count("0.0") == num_encoded


def test_a_limit_draws_the_same_rows_for_the_same_seed(encoder, tmp_path):
    rows = load([DataFile.parse(str(CONVERSATIONS))], encoder, tmp_path)
    drawn = [select(rows, ["code", "math"], 4, seed).dataset["num_response_tokens"][:] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]
    assert select(rows, ["code", "math"], 4, 0).dataset["domain"][:] == ["code"] * 4 + ["math"] * 4
    assert len(select(rows, ["code"], 100, 0)) == 10


def test_a_good_row_keeps_role_and_content_alone():
    messages = check_row(row("code", question="Q", answer="A", id=3))
    assert messages == [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
