"""The same bad file of data is the same error, one line, whichever command reads it."""

import json
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
    "data map": ["data", "map", "FOLDER", "--fusion", "FUSION"],
}


@pytest.fixture(params=COMMANDS)
def argv(request: pytest.FixtureRequest, tiny_path: Path, tmp_path: Path) -> list[str]:
    """A command that reads a file which is named `.gz` and is none."""
    folder = tmp_path / "run"
    data = folder / "dataset" / "data"
    data.mkdir(parents=True)
    (folder / "settings.json").write_text("{}")
    file, good = data / "train.jsonl.gz", tmp_path / "good.jsonl"
    file.write_bytes(b"plain text")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    good.write_text(json.dumps({"domain": "text", "messages": messages}))
    places = {"FUSION": tiny_path, "FILE": file, "GOOD": good, "FOLDER": folder}
    argv = COMMANDS[request.param]
    for name, path in places.items():
        argv = [argument.replace(name, str(path)) for argument in argv]
    argv += ["--output", str(tmp_path / "out")] if argv[0] in ("train", "analyze") else []
    return argv + (["--cache", str(tmp_path / "cache")] if str(tiny_path) in argv else [])


def test_it_is_one_line_that_names_the_file(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == EXIT_WRONG_INPUT
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ultrafuser: ")]
    assert line.startswith("ultrafuser: train.jsonl.gz: not a whole gzip file (")
    assert line.endswith("; compress it again")


def test_it_is_a_data_error(argv: list[str]) -> None:
    run = import_module(OFFLINE_COMMANDS[argv[0]].module).run
    with pytest.raises(DataError, match="not a whole gzip file"):
        run(argv[1:])
