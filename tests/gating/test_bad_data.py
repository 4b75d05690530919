"""The same bad file of data is the same error, one line, whichever command reads it."""

import gzip
import json
import re
from importlib import import_module
from pathlib import Path

import pytest

from ultrafuser.gating.errors import DataError
from ultrafuser.server.__main__ import EXIT_WRONG_INPUT, main
from ultrafuser.server.cli import OFFLINE_COMMANDS

COMMANDS = {
    "train": ["train", "FUSION", "--stage", "1", "--data", "FILE"],
    "train, to evaluate on": ["train", "FUSION", "--stage", "1", "--data", "GOOD", "--eval-data", "FILE"],
    "eval": ["eval", "FUSION", "--loss", "--data", "FILE"],
    "eval, of a benchmark": ["eval", "--benchmark", "gsm8k=FILE", "--output", "FOLDER"],
    "analyze": ["analyze", "FUSION", "--data", "FILE"],
    "data export": ["data", "export", "FOLDER", "--test-set", "FILE"],
    "data clean": ["data", "clean", "NEW", "--data", "text=FILE"],
    "data clean, against": ["data", "clean", "NEW", "--data", "GOOD", "--against", "FILE"],
    "data map": ["data", "map", "FOLDER", "--fusion", "FUSION"],
}

# 2,000 digests, which are too random to be compressed away: the rows before the damage are read.
WHOLE = gzip.compress(b"".join(b'"%s"\n' % bytes(f"{7**n % 10**40:x}", "ascii") for n in range(2000)), mtime=0)
MIDDLE = len(WHOLE) // 2


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Where every command finds its data; named `.gz`, and no gzip until a test writes some."""
    path = tmp_path / "run" / "dataset" / "data" / "train.jsonl.gz"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"plain text")
    return path


@pytest.fixture(params=COMMANDS)
def argv(request: pytest.FixtureRequest, file: Path, tiny_path: Path, tmp_path: Path) -> list[str]:
    """A command that reads the file."""
    folder, good = tmp_path / "run", tmp_path / "good.jsonl"
    (folder / "settings.json").write_text("{}")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    good.write_text(json.dumps({"domain": "text", "messages": messages}))
    places = {"FUSION": tiny_path, "FILE": file, "GOOD": good, "FOLDER": folder, "NEW": tmp_path / "new"}
    argv = COMMANDS[request.param]
    for name, path in places.items():
        argv = [argument.replace(name, str(path)) for argument in argv]
    argv += ["--output", str(tmp_path / "out")] if argv[0] in ("train", "analyze") else []
    return argv + (["--cache", str(tmp_path / "cache")] if str(tiny_path) in argv else [])


def the_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command that is given something wrong says of it."""
    assert main(argv) == EXIT_WRONG_INPUT
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ultrafuser: ")]
    return line


def test_it_is_one_line_that_names_the_file(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    line = the_line(argv, capsys)
    assert line.startswith("ultrafuser: train.jsonl.gz:1: not a whole gzip file (")
    assert line.endswith("; compress it again")


def test_it_is_a_data_error(argv: list[str]) -> None:
    run = import_module(OFFLINE_COMMANDS[argv[0]].module).run
    with pytest.raises(DataError, match="not a whole gzip file"):
        run(argv[1:])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b'{"text": "Ann has \\ud83d pens."}', "text: has half of a surrogate pair (\\ud83d)"),
        (b'{"n": ' + b"7" * 5000 + b"}", "n: a number of 5,000 digits is too long"),
        (b'{"a": ' + b"[" * 100_000, "a: arrays and objects are nested more than 100 deep"),
    ],
    ids=["half a pair", "digits", "brackets"],
)
def test_a_row_that_cannot_be_used_is_named_with_its_field(
    argv: list[str], file: Path, row: bytes, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_bytes(gzip.compress(b"\n" + row))
    assert f"train.jsonl.gz:2: {reason}" in the_line(argv, capsys)


@pytest.mark.parametrize(
    "content",
    [WHOLE[:MIDDLE] + bytes(200) + WHOLE[MIDDLE + 200 :], WHOLE[:MIDDLE], WHOLE[:-8] + bytes(8)],
    ids=["damaged", "cut", "another sum"],
)
def test_gzip_that_is_damaged_in_the_middle_is_named_with_the_row(
    content: bytes, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_bytes(content)
    (tmp_path / "run" / "settings.json").write_text("{}")
    line = the_line(["data", "export", str(tmp_path / "run"), "--test-set", str(file)], capsys)
    # The bytes after a damage may give another text before their sum gives it away.
    place = re.search(r"train\.jsonl\.gz:(\d+): not (?:a whole gzip file|JSON) \(", line)
    assert place is not None, line
    assert int(place[1]) > 500
