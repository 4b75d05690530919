"""`ultrafuser train`: found in the help, run by the one command, its mistakes told in one line."""

from pathlib import Path

import pytest

from tests.fakes import write_tiny_fusion
from tests.gating.examples import CONVERSATIONS
from ultrafuser.gating.model.fusion import load_fusion
from ultrafuser.server.__main__ import EXIT_INTERRUPTED, EXIT_WRONG_INPUT, main
from ultrafuser.server.cli import build_parser


def test_the_command_is_listed_in_the_help() -> None:
    assert "train a gate, specialists, or both" in build_parser().format_help()


def test_the_command_has_a_help_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", "--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("usage: ultrafuser train FUSION")


def test_the_command_trains_in_the_environments_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fusion = write_tiny_fusion(tmp_path / "fusion")
    monkeypatch.setenv("ULTRAFUSER_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out"
    argv = ["train", str(fusion), "--stage", "1", "--data", str(CONVERSATIONS), "--output", str(out)]
    assert main([*argv, "--steps", "2", "--rows-per-domain", "1"]) == 0
    assert load_fusion(out).gate == str(out / "gate.safetensors")
    assert list((tmp_path / "cache").glob("rows-*"))


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["demo"], "the following arguments are required"),
        (["demo", "--data", "none.jsonl", "--output", "o"], "--stage: name either a stage"),
        (["demo", "--data", "none.jsonl", "--output", "o", "--stage", "1"], "none.jsonl: no such data file"),
        (
            ["none.yaml", "--data", str(CONVERSATIONS), "--output", "o", "--stage", "1"],
            "none.yaml: no such fusion file",
        ),
    ],
)
def test_mistakes_are_one_line_and_exit_status_2(
    argv: list[str],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", *argv, "--cache", "cache"]) == EXIT_WRONG_INPUT
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("ultrafuser: ")
    assert complaint in line
    assert not list(tmp_path.iterdir()), "no folder is left behind"


def test_ctrl_c_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("ultrafuser.gating.training.command.run", interrupted)
    assert main(["train"]) == EXIT_INTERRUPTED
    assert "with --resume goes on" in capsys.readouterr().err
