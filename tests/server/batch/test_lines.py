"""What a batch's files say: which request is whose, which are answered already, and what cannot be one."""

import json
import resource
from pathlib import Path
from typing import Any

import pytest

from ultrafuser.gating.errors import CommandError, DataError
from ultrafuser.server.__main__ import EXIT_WRONG_INPUT, main
from ultrafuser.server.batch import command
from ultrafuser.server.batch.command import parse_settings
from ultrafuser.server.batch.lines import URLS, answered, custom_ids, not_sent, read_requests, sole_output
from ultrafuser.server.settings import SettingsError


@pytest.fixture(autouse=True)
def signals_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "at_stop_signals", lambda _handler: None)


def request(custom_id: str = "a", **changes: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    return {"custom_id": custom_id, "method": "POST", "url": URLS[0], "body": body, **changes}


def written(path: Path, *rows: Any) -> Path:
    """A file of these rows, each JSON or a text as it is."""
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def answer(custom_id: str | None, status: int = 200) -> dict[str, Any]:
    response = {"status_code": status, "request_id": "r", "body": {"text": f"of {custom_id}"}}
    return {"id": "batch_req_1", "custom_id": custom_id, "response": response, "error": None}


def rows_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([request("a"), request("b"), request("a")], "in.jsonl:3: custom_id: 'a' is line 1's"),
        ([request("a"), {"url": URLS[0]}], "in.jsonl:2: custom_id: missing"),
        ([request("")], "in.jsonl:1: custom_id: missing"),
        ([request("a") | {"custom_id": 7}], "in.jsonl:1: custom_id: missing"),
        (["", " "], "in.jsonl: has no line"),
    ],
)
def test_an_id_that_is_missing_or_there_twice_is_told_before_work_begins(
    rows: list[Any], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = written(tmp_path / "in.jsonl", *rows)
    assert main(["batch", str(source), str(tmp_path / "out.jsonl")]) == EXIT_WRONG_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ultrafuser: {complaint}")
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("{", "invalid_json_line", "line 1: not JSON"),
        ("[1]", "invalid_json_line", "line 1: not a JSON object"),
        ('{"custom_id": "a", "custom_id": "b"}', "invalid_json_line", "line 1: custom_id: the key is there twice"),
        (request(url="/v1/embeddings"), "invalid_url", "url: '/v1/embeddings'; give one of /v1/chat/completions"),
        (request(url=["x"]), "invalid_url", "url: ['x']"),
        (request(method="GET"), "invalid_method", "method: 'GET'; give POST"),
        ({"custom_id": "a", "url": URLS[0], "body": {}}, "invalid_method", "method: None"),
        (request(body=[]), "invalid_body", "body: not a JSON object"),
        (request(body={"stream": True}), "invalid_body", "stream: true"),
    ],
)
def test_a_line_that_is_no_request_has_an_error_of_its_own(line: Any, code: str, message: str, tmp_path: Path) -> None:
    source = written(tmp_path / "in.jsonl", line)
    (wrong,) = read_requests(source, ())
    told = not_sent(wrong)
    assert told["custom_id"] == (line["custom_id"] if isinstance(line, dict) else None)
    assert told["response"] is None
    assert told["error"]["code"] == code
    assert told["error"]["message"].startswith(message)


@pytest.mark.parametrize("url", URLS)
def test_every_route_that_generates_is_taken(url: str, tmp_path: Path) -> None:
    (good,) = read_requests(written(tmp_path / "in.jsonl", request(url=url)), ())
    assert (good.url, json.loads(good.body), good.problem) == (url, request()["body"], None)


def test_what_is_answered_stays_and_what_failed_is_tried_again(tmp_path: Path) -> None:
    """A refusal has a body, too: the status decides. The last line was being written when the run was killed."""
    source = written(tmp_path / "in.jsonl", *(request(name) for name in "abcde"), "{")
    failed = [answer("b", 400), answer("c", 503), *map(not_sent, read_requests(written(tmp_path / "x", "{"), ()))]
    out = written(tmp_path / "out.jsonl", answer("a"), *failed, answer("d"))
    with out.open("a") as file:
        file.write(json.dumps(answer("e"))[:-2])
    ids, num_lines = custom_ids(source)
    assert num_lines == 6
    with sole_output(out, ids, resumes=True) as (output, done):
        assert done == {"a", "d"}
        assert rows_of(out) == [answer("a"), answer("d")]
        left = list(read_requests(source, done))
        assert [one.custom_id for one in left] == ["b", "c", "e", None]
        line = answered(left[0], 200, "r", {"text": "of b"})
        output.write(line)
        assert rows_of(out) == [answer("a"), answer("d"), line]
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (answer("z"), "out.jsonl:1: 'z' is not in the input"),
        ("no JSON", "out.jsonl:1: not of a batch's output"),
        (request("a"), "out.jsonl:1: not of a batch's output"),  # the input itself: it would be emptied
        ([1], "out.jsonl:1: not of a batch's output"),
        (answer("a") | {"custom_id": ["a"]}, "out.jsonl:1: not of a batch's output"),
    ],
)
def test_a_file_that_is_not_this_batchs_output_is_left_as_it_is(row: Any, complaint: str, tmp_path: Path) -> None:
    out = written(tmp_path / "out.jsonl", row)
    before = out.read_bytes()
    with pytest.raises(CommandError, match=complaint), sole_output(out, {"a"}, resumes=True):
        pass
    assert out.read_bytes() == before
    assert list(tmp_path.iterdir()) == [out]


def test_an_output_that_is_there_is_only_gone_on_with_if_asked(tmp_path: Path) -> None:
    out = written(tmp_path / "out.jsonl", answer("a"))
    with pytest.raises(CommandError, match="is there already; add --resume"), sole_output(out, {"a"}, resumes=False):
        pass
    assert rows_of(out) == [answer("a")]


@pytest.mark.parametrize("resumes", [False, True])
def test_two_runs_never_write_to_one_output(resumes: bool, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    if resumes:
        written(out, answer("a"))
    refused = pytest.raises(CommandError, match="another run writes to")
    with sole_output(out, {"a"}, resumes=resumes), refused, sole_output(out, {"a"}, resumes=True):
        pass
    with sole_output(out, {"a"}, resumes=True) as (_, done):
        assert done == ({"a"} if resumes else set())


def test_an_output_that_cannot_be_written_is_told_before_work_begins(tmp_path: Path) -> None:
    with (
        pytest.raises(CommandError, match="cannot be written"),
        sole_output(tmp_path / "no" / "out", (), resumes=False),
    ):
        pass


def test_an_output_that_cannot_be_gone_on_with_is_left_as_it_is(tmp_path: Path) -> None:
    """A folder that takes no new file, a full disk: each was a traceback."""
    out = written(tmp_path / "out.jsonl", answer("a"))
    before = out.read_bytes()
    (tmp_path / "out.jsonl.partial").mkdir()
    told = r"out.jsonl: cannot be written, as out.jsonl.partial beside it cannot \(Is a directory\); name another file"
    with pytest.raises(CommandError, match=told), sole_output(out, {"a"}, resumes=True):
        pass
    (tmp_path / "out.jsonl.partial").rmdir()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) - 1, limits[1]))
    try:
        full = pytest.raises(CommandError, match=r"out.jsonl: cannot be written \(File too large\); make room")
        with full, sole_output(out, {"a"}, resumes=True):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert out.read_bytes() == before
    assert list(tmp_path.iterdir()) == [out]


def test_a_link_to_an_output_stays_one(tmp_path: Path) -> None:
    """It is there since the answers have no room where it is."""
    out, link = written(tmp_path / "out.jsonl", answer("a"), answer("b", 400)), tmp_path / "link.jsonl"
    link.symlink_to(out)
    with sole_output(link, {"a", "b"}, resumes=True) as (output, done):
        output.write(answer("b"))
    assert done == {"a"}
    assert link.is_symlink()
    assert rows_of(out) == [answer("a"), answer("b")]


def test_plain_lines_get_no_name_that_says_gzip(tmp_path: Path) -> None:
    """The input may be gzipped; an output of such a name could not be read again."""
    with (
        pytest.raises(CommandError, match=r"answers are written as plain lines; name a file without .gz"),
        sole_output(tmp_path / "out.jsonl.gz", (), resumes=False),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_everything_answered_already_starts_no_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = written(tmp_path / "in.jsonl", request("a")), written(tmp_path / "out.jsonl", answer("a"))
    assert main(["batch", str(source), str(out), "--resume"]) == 0
    assert capsys.readouterr().err == "all requests are answered already\n"


def test_flags_and_the_environment_are_the_servers(tmp_path: Path) -> None:
    asked = parse_settings(
        ["in", "out", "--fusion", "my.yaml", "--max-num-seqs", "4", "--max-items", "1K"],
        {"ULTRAFUSER_SEED": "7", "ULTRAFUSER_API_KEY": "secret", "ULTRAFUSER_PORT": "80"},
    )
    assert (asked.settings.input, asked.settings.output, asked.settings.fusion) == ("in", "out", "my.yaml")
    assert (asked.engine_options, asked.settings.max_items) == ({"max_num_seqs": 4, "seed": 7}, 1024)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["in"], "the following arguments are required: OUTPUT"),
        (["in", "out", "more"], "more: unexpected argument; name two files"),
        (["in", "out", "--port", "80"], "--port: only `ultrafuser serve` has this option"),
        (["in", "out", "--max-num-seq", "80"], "did you mean --max-num-seqs"),
        (["in", "out", "--enable-lora"], "--enable-lora: LoRA requests are not fused"),
        (["in", "out", "--max-items", "1"], "--max-items: .*'1'"),
    ],
)
def test_a_wrong_argument_is_named_with_the_way_out(argv: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        parse_settings(argv, {})


def test_a_missing_input_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.jsonl"):
        custom_ids(tmp_path / "none.jsonl")
    assert main(["batch", str(tmp_path / "none.jsonl"), "out"]) == EXIT_WRONG_INPUT
