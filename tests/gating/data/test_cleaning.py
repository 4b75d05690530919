"""`ultrafuser data clean`: what is removed and why, what stays is as it was, and a run that fails leaves nothing."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from ultrafuser.gating.data.cleaning import NUM_EXAMPLES
from ultrafuser.gating.data.conversations import Conversation, DataFile, read_conversations
from ultrafuser.gating.synthesis.command import run
from ultrafuser.server.__main__ import EXIT_WRONG_INPUT, main

RUN = "the quick brown fox jumps over the lazy dog while seven owls watch it"
EVEN = "Write a Python function that returns the largest even number in a list of integers."


def row(question: str, answer: str = "Yes.", system: str | None = None, **more: Any) -> dict[str, Any]:
    first = [{"role": "system", "content": system}] if system else []
    pair = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {**more, "messages": [*first, *pair]}


def write(path: Path, *rows: Any) -> Path:
    lines = [own if isinstance(own, bytes) else json.dumps(own).encode() for own in rows]
    content = b"\n".join(lines)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def lines_of(path: Path) -> list[bytes]:
    content = path.read_bytes()
    return (gzip.decompress(content) if path.suffix == ".gz" else content).splitlines(keepends=True)


def clean(output: Path, *arguments: str) -> dict[str, Any]:
    """The report."""
    assert main(["data", "clean", str(output), "--data", *arguments]) == 0
    return json.loads((output / "report.json").read_text())


@pytest.fixture
def code(tmp_path: Path) -> Path:
    return write(
        tmp_path / "code.jsonl",
        row(EVEN),
        row(EVEN.replace("largest", "smallest"), "No."),
        b"",
        row(EVEN.upper()),
        b"{not json",
        row("What does this do?", f"Look: {RUN}!"),
        row("Why does my loop never end?", id=7),
    )


@pytest.fixture
def law(tmp_path: Path) -> Path:
    rows = [row("Who owns a found ring?", domain="law"), row("why does my LOOP never end", domain="law")]
    return write(tmp_path / "law.jsonl.gz", *rows, row("May a tenant paint the walls?", domain="law"))


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    return write(tmp_path / "bench.jsonl.gz", {"q": "none"}, {"options": [{"text": f"So {RUN.title()}."}]})


def test_rows_alike_in_any_file_contaminated_and_unusable_rows_go_and_the_report_says_why(code, law, bench, tmp_path):
    out = tmp_path / "clean"
    report = clean(out, f"code={code}", str(law), "--against", str(bench))
    assert report["test_sets"] == ["bench"]
    own, other = report["files"]["code.jsonl"], report["files"]["law.jsonl.gz"]
    assert (own["rows"], own["kept"], other["rows"], other["kept"]) == (6, 2, 3, 2)
    assert own["removed"] == {"contaminated by bench": 1, "duplicate": 1, "near_duplicate": 1, "unusable": 1}
    assert other["removed"] == {"duplicate": 1}
    reason = own["examples"][2].pop("why")
    assert reason.startswith("not JSON")
    words = " ".join(RUN.split()[:13])
    assert own["examples"] == [
        {"line": 2, "reason": "near_duplicate", "of": "code.jsonl:1"},
        {"line": 4, "reason": "duplicate", "of": "code.jsonl:1"},
        {"line": 5, "reason": "unusable"},
        {"line": 6, "reason": "contaminated by bench", "found_in": "bench:2", "run": words},
    ]
    assert other["examples"] == [{"line": 2, "reason": "duplicate", "of": "code.jsonl:7"}]


def test_a_thought_that_a_test_set_has_is_found(bench, tmp_path):
    """It is read before the response, as the question is."""
    thoughtful = row("What is under the hood?", "A motor.")
    thoughtful["messages"][1]["reasoning"] = f"They ask: {RUN}."
    report = clean(
        tmp_path / "clean", f"x={write(tmp_path / 'x.jsonl', row(EVEN), thoughtful)}", "--against", str(bench)
    )
    assert report["files"]["x.jsonl"]["removed"] == {"contaminated by bench": 1}


def test_what_stays_is_the_files_own_lines_and_training_reads_them(code, law, tmp_path):
    out = tmp_path / "clean"
    clean(out, f"code={code}", str(law))
    before = lines_of(code)
    assert lines_of(out / "code.jsonl") == [before[0], before[5], before[6] + b"\n"]
    kept = [own for _, own, _ in read_conversations(DataFile(out / "law.jsonl.gz"))]
    assert [type(own) for own in kept] == [Conversation] * 2
    assert sorted(path.name for path in out.iterdir()) == [
        "code.jsonl", "law.jsonl.gz", "provenance.json", "report.json"
    ]  # fmt: skip
    assert set(json.loads((out / "provenance.json").read_text())["data_sha256"]) == {"code.jsonl", "law.jsonl.gz"}


def test_the_first_file_is_preferred(code, law, tmp_path):
    report = clean(tmp_path / "clean", str(law), f"code={code}")
    assert report["files"]["code.jsonl"]["examples"][-1] == {"line": 7, "reason": "duplicate", "of": "law.jsonl.gz:2"}


def test_two_runs_are_equal_bytes(code, law, bench, tmp_path):
    contents = []
    for name in ("first", "second"):
        clean(tmp_path / name, f"code={code}", str(law), "--against", f"own={bench}")
        files = ("code.jsonl", "law.jsonl.gz", "report.json")
        contents.append([(tmp_path / name / file).read_bytes() for file in files])
    assert contents[0] == contents[1]
    assert contents[0][1][4:8] == bytes(4), "gzip's time of writing"


def test_a_shared_system_prompt_or_greeting_or_answer_makes_no_duplicate(tmp_path):
    system = "You are a helpful assistant that answers every question in full sentences, kindly and briefly."
    rows = [row(question, "I do not know.", system) for question in ("Why is the sky blue?", "Who made fire?")]
    for question in ("Name a river.", "Sing to me about rain."):
        turns = row("Hello!")["messages"] + row(question)["messages"]
        rows.append({"messages": turns})
    report = clean(tmp_path / "clean", f"text={write(tmp_path / 'text.jsonl', *rows)}")
    assert report["files"]["text.jsonl"]["removed"] == {}


def test_marks_alone_are_texts_of_their_own(tmp_path):
    """All of them were once the same empty text."""
    report = clean(tmp_path / "clean", f"text={write(tmp_path / 'text.jsonl', row('+ - *'), row('???'), row('???'))}")
    assert report["files"]["text.jsonl"]["removed"] == {"duplicate": 1}


def test_a_higher_threshold_keeps_more(code, tmp_path):
    report = clean(tmp_path / "clean", f"code={code}", "--duplicate-threshold", "0.95")
    assert "near_duplicate" not in report["files"]["code.jsonl"]["removed"]


def test_the_report_counts_all_and_names_the_first_of_each_reason(tmp_path):
    rows = [row("Why is the sea salt?")] * (NUM_EXAMPLES + 6)
    own = clean(tmp_path / "clean", f"text={write(tmp_path / 'text.jsonl', *rows)}")["files"]["text.jsonl"]
    assert own["removed"] == {"duplicate": NUM_EXAMPLES + 5}
    assert [example["line"] for example in own["examples"]] == list(range(2, NUM_EXAMPLES + 2))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["text=none.jsonl"], "none.jsonl: no such data file"),
        (
            ["text=bad.jsonl"],
            "bad.jsonl: no row would be left (all 1 are removed, the first: bad.jsonl:1: not JSON",
        ),
        (["text=empty.jsonl"], "empty.jsonl: no row would be left (it has none); leave it out"),
        (["good.jsonl", "a=same.jsonl"], "(all 1 are removed, the first: same.jsonl:1: duplicate); leave it out"),
        (["good.jsonl", "copy/good.jsonl"], "good.jsonl: is the name of two files of the output folder; rename one"),
        (["report.json"], "report.json: is the name of two files of the output folder; rename one"),
        (["good.jsonl", "--against", "none.jsonl"], "none.jsonl: no such file"),
        (["good.jsonl", "--against", "short.jsonl"], "short.jsonl: has no text of 6 words to compare with"),
        (["good.jsonl", "--against", "a=bench.jsonl", "a=short.jsonl"], "a: is the name of two files; give each test"),
        (["good.jsonl", "cut.jsonl.gz"], "cut.jsonl.gz:1: not a whole gzip file"),
        (["good.jsonl", "--duplicate-threshold", "2"], "--duplicate-threshold: "),
    ],
)
def test_what_cannot_be_done_is_one_line_and_leaves_nothing(arguments, complaint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    good = row("Why is the sea salt?", domain="text")
    (tmp_path / "copy").mkdir()
    for path in ("good.jsonl", "copy/good.jsonl", "report.json", "same.jsonl"):
        write(tmp_path / path, good)
    write(tmp_path / "bad.jsonl", b"{")
    write(tmp_path / "empty.jsonl")
    write(tmp_path / "short.jsonl", {"q": "too short"})
    write(tmp_path / "bench.jsonl", {"q": RUN})
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(json.dumps(good).encode())[:-9])
    assert main(["data", "clean", "out", "--data", *arguments]) == EXIT_WRONG_INPUT
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ultrafuser: ")]
    assert complaint in line
    assert not list(tmp_path.glob("out*"))


def test_a_folder_with_something_in_it_is_refused_and_stays(code, tmp_path, capsys):
    out = tmp_path / "clean"
    out.mkdir()
    assert main(["data", "clean", str(out), "--data", f"code={code}"]) == 0
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert main(["data", "clean", str(out), "--data", f"code={code}"]) == EXIT_WRONG_INPUT
    assert f"output: {out} is there and not empty; name a new folder" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_an_empty_folder_that_is_where_one_stands_is_refused(code, tmp_path, monkeypatch, capsys):
    """It was a traceback: the folder takes the place of the one that is there, which needs its name."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main(["data", "clean", ".", "--data", f"code={code}"]) == EXIT_WRONG_INPUT
    assert capsys.readouterr().err == "ultrafuser: output: . is no name that can be given; name a new folder\n"


def test_a_test_set_that_is_not_there_is_told_before_rows_are_fetched(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ultrafuser.gating.data.hub.open_data", lambda *_, **__: pytest.fail("rows were fetched"))
    arguments = [str(tmp_path / "clean"), "--data", "math=hub:org/sums", "--against", str(tmp_path / "none.jsonl")]
    assert main(["data", "clean", *arguments]) == EXIT_WRONG_INPUT
    assert "none.jsonl: no such file; give JSON lines, FILE or NAME=FILE" in capsys.readouterr().err


def test_a_run_that_is_stopped_leaves_nothing_and_the_next_one_is_whole(code, tmp_path, monkeypatch):
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "clean"
    with monkeypatch.context() as patch:
        patch.setattr("ultrafuser.gating.data.cleaning.write_json", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(["clean", str(out), "--data", f"code={code}"])
    assert not out.exists()
    assert clean(out, f"code={code}")["files"]["code.jsonl"]["kept"] == 3
