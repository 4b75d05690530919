"""What is missing of a fusion: each thing that can be, once, with what gets it."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.fakes import write_tiny_fusion
from ultrafuser.gating.model.fusion import load_fusion
from ultrafuser.server.doctor.finding import Finding
from ultrafuser.server.doctor.ingredients import Ingredients, look_into, tokenizer_packages


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A fusion of two that is complete."""
    return write(tmp_path / "fusion", "text", "code")


def write(folder: Path, *names: str) -> Path:
    return write_tiny_fusion(folder, names=names, num_layers=(1, 1), hidden_sizes=(64, 64), vocab_sizes=(320, 320))


def look(file: Path, **changes: Any) -> Ingredients:
    """At the fusion, with keys of its file set anew; `specialists.0.KEY` is written `first_KEY`."""
    content = yaml.safe_load(file.read_text())
    for key, value in changes.items():
        place = content["specialists"][0] if key.startswith("first_") else content
        place[key.removeprefix("first_")] = value
    file.write_text(yaml.safe_dump(content))
    return look_into(load_fusion(file), "my.yaml", file.parent / "cache")


def test_a_fusion_that_is_complete_lacks_nothing(file: Path) -> None:
    found = look(file)
    assert found.findings == ()
    assert [(one.name, one.state) for one in found.specialists] == [("text", "here"), ("code", "here")]
    assert found.gate == f"paper, {file.parent / 'gate.safetensors'}"
    assert (found.max_model_len, found.to_prepare) == (1024, ())


def test_a_gate_that_is_missing_is_trained(file: Path) -> None:
    (file.parent / "gate.safetensors").unlink()
    found = look(file)
    (finding,) = found.findings
    assert finding.what == f"gate: no such file {file.parent / 'gate.safetensors'}"
    assert finding.way_out.startswith("ultrafuser train my.yaml --data DOMAIN=FILE --output FOLDER --stage 1")
    assert found.gate == "missing"


def test_a_gate_of_others_is_told(file: Path) -> None:
    other = write(file.parent / "other", "law", "code")
    found = look(file, gate=str(other.parent / "gate.safetensors"))
    assert ["specialists" in finding.what for finding in found.findings] == [True]
    assert found.gate == "unfit"


def test_a_model_that_the_hubs_cache_lacks_is_downloaded(file: Path) -> None:
    found = look(file, first_model="nobody/nothing", first_revision="abc")
    assert found.findings == (
        Finding(
            "specialists.0.model: nobody/nothing is not in the hub's cache",
            "hf download nobody/nothing --revision abc",
        ),
    )
    assert [one.state for one in found.specialists] == ["missing", "here"]
    assert found.max_model_len is None


def test_a_download_that_broke_off_goes_on(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = tmp_path / "hub"
    repository = hub / "models--org--half"
    snapshot = repository / "snapshots" / "abc"
    shutil.copytree(file.parent / "text", snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(hub))
    (snapshot / "model.safetensors").unlink()
    (finding,) = look(file, first_model="org/half").findings
    assert "has no weights" in finding.what
    assert finding.way_out == "hf download org/half"


def test_an_adapter_that_is_missing_is_downloaded(file: Path) -> None:
    found = look(file, first_adapter="nobody/adapter")
    assert [finding.way_out for finding in found.findings] == ["hf download nobody/adapter"]


def test_an_adapter_that_is_here_is_merged_by_the_first_start(file: Path) -> None:
    adapter = Path(__file__).parents[3] / "gating" / "demo" / "adapters" / "text"
    found = look(file, first_adapter=str(adapter))
    assert found.findings == ()
    assert found.to_prepare == ("merging adapter text of text",)
    assert [one.state for one in found.specialists] == ["prepared by the first start", "here"]
    assert found.prepared_bytes == (file.parent / "text" / "model.safetensors").stat().st_size
    assert not (file.parent / "cache").exists(), "nothing is prepared by looking"


def test_the_demo_is_known_before_its_first_start(tmp_path: Path) -> None:
    found = look_into(load_fusion("demo"), "demo", tmp_path)
    assert found.findings == ()
    assert [one.state for one in found.specialists] == ["prepared by the first start"] * 3
    assert len(found.to_prepare) == 4, "one model, and three adapters"
    assert [one.shape.num_parameters for one in found.specialists if one.shape] == [134515008] * 3
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_carries_no_model_is_told_by_key(file: Path) -> None:
    (finding,) = look(file, first_model="package:json").findings
    assert finding.what.startswith("specialists.0.model: package 'json' carries no known model")


def test_tokenizers_that_disagree_are_told(file: Path) -> None:
    path = file.parent / "text" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    path.write_text(json.dumps(tokenizer))
    (finding,) = look(file).findings
    assert "specialists.1.model: its tokenizer has" in finding.what
    assert finding.way_out == "fuse models that share one vocabulary"


@pytest.mark.parametrize(
    ("files", "packages"),
    [
        (["tokenizer.model"], ["sentencepiece"]),
        (["qwen.tiktoken"], ["tiktoken"]),
        (["tokenizer.json", "tokenizer.model"], []),
        ([], []),
    ],
)
def test_a_tokenizer_that_is_not_ready_needs_a_package(tmp_path: Path, files: list[str], packages: list[str]) -> None:
    for name in files:
        (tmp_path / name).touch()
    assert tokenizer_packages(tmp_path) == packages


def test_a_package_of_a_tokenizer_that_is_missing_is_installed(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = file.parent / "text"
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    (finding,) = look(file).findings
    assert finding.way_out == "pip install sentencepiece"


def test_a_parser_that_is_not_supported_is_told_with_those_that_are(file: Path) -> None:
    (finding,) = look(file, tool_call_parser="nobodys").findings
    assert finding.what == "tool_call_parser: 'nobodys' is not supported"
    assert "hermes" in finding.way_out
