"""`ultrafuser remove`: a specialist leaves a fusion and its gate; nothing is trained, and no model is looked at."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.fakes import write_tiny_fusion
from tests.gating.model.test_gate_seats import trained_gate
from ultrafuser.gating.model.fusion import load_fusion
from ultrafuser.gating.model.gate_file import load_gate, save_gate
from ultrafuser.gating.model.gate_kind import GateKind
from ultrafuser.gating.model.gate_seats import without
from ultrafuser.gating.model.reference import UltraFuserForCausalLM
from ultrafuser.server.__main__ import EXIT_WRONG_INPUT, main

NAMES = ("text", "code", "math")
PROMPTS = [[5, 80, 90, 100], [7, 81], [9, 82, 92]]


def remove(fusion: Path, name: str, output: Path) -> Path:
    assert main(["remove", str(fusion), "--specialist", name, "--output", str(output)]) == 0
    return output / "fusion.yaml"


def weights_of(path: Path, prompts: list[list[int]]) -> torch.Tensor:
    """The reference's mixing weights [S] of the token after the prompts."""
    model = UltraFuserForCausalLM.from_fusion(load_fusion(path))
    (generation,) = model.respond([prompts], max_new_tokens=1)
    return generation.gate_weights[0]


@pytest.fixture(scope="module")
def alike(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Specialists of one vocabulary: any two of them can be fused."""
    return write_tiny_fusion(tmp_path_factory.mktemp("alike"), vocab_sizes=(320, 320, 320))


@pytest.mark.parametrize("name", NAMES)
def test_the_others_share_out_the_weight_in_proportion(
    alike: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = remove(alike, name, tmp_path / "rest")
    said = capsys.readouterr().err
    rest = [index for index, own in enumerate(NAMES) if own != name]
    fusion = load_fusion(path)
    assert fusion.specialists == tuple(load_fusion(alike).specialists[index] for index in rest)
    before = weights_of(alike, PROMPTS)[rest]
    now = weights_of(path, [PROMPTS[index] for index in rest])
    torch.testing.assert_close(now, before / before.sum())
    assert ("code leads now, in the place of text: it samples" in said) == (name == "text")
    assert said.endswith(f"removed: {path}\n")
    assert json.loads((path.parent / "manifest.json").read_text())["settings"]["specialist"] == name


def test_the_last_one_needs_no_gate(tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two = remove(tiny_path, "math", tmp_path / "two")
    one = remove(two, "text", tmp_path / "one")
    fusion = load_fusion(one)
    assert (fusion.specialist_names, fusion.gate) == (("code",), None)
    files = ["config.json", "fusion.yaml", "manifest.json", "modeling_ultrafuser.py"]
    assert sorted(path.name for path in one.parent.iterdir()) == files
    assert "code is left alone, and needs no gate" in capsys.readouterr().err
    assert weights_of(one, PROMPTS[:1]).tolist() == [1.0]


def test_a_gate_of_another_kind_stays_one(tiny_copy: Path, tmp_path: Path) -> None:
    kind = GateKind(joint=True, scaled=True, smoothed=True)
    gate = trained_gate((64, 64, 64), kind)
    save_gate(gate, tiny_copy.parent / "gate.safetensors", NAMES)
    path = remove(tiny_copy, "code", tmp_path / "rest")
    after, wanted = load_gate(path.parent / "gate.safetensors", ("text", "math"), (64, 64)), without(gate, 1)
    assert after.kind == kind
    state = after.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in wanted.state_dict().items())


def test_adapters_come_along_and_a_fresh_gate_stays_fresh(tiny_copy: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(tiny_copy.read_text())
    for item in content["specialists"][1:]:
        folder = tiny_copy.parent / f"adapter-of-{item['name']}"
        folder.mkdir()
        (folder / "adapter_config.json").write_text("{}")
        item["adapter"] = f"./{folder.name}"
    tiny_copy.write_text(yaml.safe_dump({**content, "gate": "package:fresh"}))
    path = remove(tiny_copy, "code", tmp_path / "rest")
    fusion = load_fusion(path)
    assert fusion.gate == "package:fresh"
    assert fusion.specialists[1].adapter == str(path.parent / "adapters" / "math")
    assert [folder.name for folder in (path.parent / "adapters").iterdir()] == ["math"]


def test_a_draft_head_is_left_out_by_name(with_head: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fusion = load_fusion(remove(with_head, "math", tmp_path / "rest"))
    assert fusion.engine.speculation is not None
    assert (fusion.engine.speculation.path, fusion.engine.speculation.max_tokens) == (None, 3)
    assert "the draft head is left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["FUSION"], "the following arguments are required: --specialist, --output"),
        (["FUSION", "--specialist", "law", "--output", "o"], "--specialist: 'law' is not in the fusion; it has text"),
        (["none", "--specialist", "law", "--output", "o"], "none: no such fusion file"),
        (["FUSION", "--specialist", "code", "--output", "FOLDER"], "has a fusion.yaml, which would be replaced; name"),
        (["ELSEWHERE", "--specialist", "code", "--output", "FOLDER"], "has a fusion.yaml, which would be replaced"),
        (["ELSEWHERE", "--specialist", "code", "--output", "GATE"], "has a gate.safetensors, which would be replaced"),
        (["FUSION", "--specialist", "code", "--output", "FUSION"], "cannot be a folder (Not a directory)"),
        (["OTHER", "--specialist", "code", "--output", "o"], "the gate was made for ['text', 'code', 'math'], the"),
        (["ALONE", "--specialist", "code", "--output", "o"], "--specialist: 'code' is the only one of tiny"),
        (["LOST", "--specialist", "code", "--output", "o"], "no such gate file"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_line_and_leaves_nothing(
    tiny_copy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    complaint: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    content = yaml.safe_load(tiny_copy.read_text())
    first, second, third = content["specialists"]
    changes: dict[str, dict[str, Any]] = {
        "OTHER": {"specialists": [second, first, third]},
        "ALONE": {"specialists": [second], "gate": None},
        "LOST": {"gate": "lost.safetensors"},
    }
    places = {"FUSION": str(tiny_copy), "FOLDER": str(tiny_copy.parent), "GATE": str(tmp_path / "gate")}
    (tmp_path / "gate").mkdir()
    shutil.copy(tiny_copy.parent / "gate.safetensors", tmp_path / "gate")
    changes["ELSEWHERE"] = {"gate": str(tmp_path / "gate" / "gate.safetensors")}
    for name, change in changes.items():
        places[name] = str(tiny_copy.with_name(f"{name}.yaml"))
        Path(places[name]).write_text(yaml.safe_dump({**content, **change}))
    before = sorted(tmp_path.rglob("*"))
    assert main(["remove", *(places.get(word, word) for word in argv)]) == EXIT_WRONG_INPUT
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("ultrafuser: ")
    assert complaint in line
    assert sorted(tmp_path.rglob("*")) == before


def test_the_fusion_that_it_starts_from_is_not_changed(tiny_copy: Path, tmp_path: Path) -> None:
    kept = shutil.copytree(tiny_copy.parent, tmp_path / "kept")
    remove(tiny_copy, "text", tmp_path / "rest")
    files = [path for path in kept.rglob("*") if path.is_file()]
    assert files
    assert all(path.read_bytes() == (tiny_copy.parent / path.relative_to(kept)).read_bytes() for path in files)
