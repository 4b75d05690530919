"""The example of a fourth domain in docs/training.md, command by command: from its description to a fusion of four."""

import gzip
import json
import re
import shlex
from pathlib import Path

import pytest

from tests.fakes import write_tiny_fusion
from tests.gating.examples import CONVERSATIONS
from tests.gating.synthesis.model import serving_model
from ultrafuser.gating.model.fusion import load_fusion
from ultrafuser.server.__main__ import main

DOCS = Path(__file__).parents[3] / "docs"
NAMES = ("text", "code", "math", "law")
SECTION = (DOCS / "training.md").read_text().split("\n## 9. ")[1].split("\n## ")[0]

# What makes the example small, added to its commands.
FEW = {
    "make": "--meta-topics 2 --sub-topics 2 --instructions 3 --strong 1 --weak 1 --complex-share 0",
    "export": "--validation-share 0.3",
    "clean": "",
    "--specialist": "--steps 2 --rows-per-domain 2 --max-length 500",
    "--stage": "--steps 2 --rows-per-domain 2 --max-length 500",
    "--loss": "--max-length 500",
}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def write(path: str, rows: list[str]) -> None:
    Path(path).write_bytes(gzip.compress("\n".join(rows).encode()))


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the example begins with, in the current folder. One text is in the code, too, one is held out, too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ULTRAFUSER_CACHE", str(tmp_path / "cache"))
    write_tiny_fusion(tmp_path / "models")
    Path("four.yaml").write_text(blocks(SECTION, "yaml")[0])
    Path("law.yaml").write_text(blocks((DOCS / "data.md").read_text(), "yaml")[0])
    rows = CONVERSATIONS.read_text().splitlines()
    own = {name: [row for row in rows if json.loads(row)["domain"] == name] for name in NAMES[:3]}
    for name, mine in own.items():
        write(f"{name}.jsonl.gz", mine[:7] + (own["text"][:1] if name == "code" else []))
    write("held-out.jsonl.gz", [row for mine in own.values() for row in mine[7:]] + own["math"][1:2])


def test_the_commands_of_the_page_end_in_a_fusion_of_four(files: None, capsys: pytest.CaptureFixture[str]) -> None:
    lines = "\n".join(blocks(SECTION, "sh")).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line) for line in lines if line]
    assert [words[0] for words in commands] == ["ultrafuser"] * 6
    with serving_model() as endpoint:
        for words in commands:
            (few,) = [own for name, own in FEW.items() if name in words]
            there = ["--base-url", endpoint.base_url] if "make" in words else []
            assert main([*words[1:], *few.split(), *there]) == 0, words
    report = json.loads(Path("clean/report.json").read_text())["files"]
    assert report["code.jsonl.gz"]["removed"] == {"duplicate": 1}
    assert report["math.jsonl.gz"]["removed"] == {"contaminated by held-out": 1}
    table = capsys.readouterr().out
    assert all(re.search(rf"\b{name}\b", table) for name in (*NAMES, "fused"))
    fusion = load_fusion("trained/four")
    assert tuple(fusion.specialist_names) == NAMES
    assert [own.adapter is not None for own in fusion.specialists] == [False, False, False, True]
    assert fusion.gate == str(Path("trained/four/gate.safetensors").resolve())
    metrics = json.loads(Path("trained/four/manifest.json").read_text())["metrics"]
    assert {f"eval_gate_law_{name}" for name in NAMES} <= metrics.keys()
