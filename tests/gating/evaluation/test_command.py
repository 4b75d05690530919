"""`ultrafuser eval`: the command, its files and its mistakes. What it measures is tested in evaluation/."""

import json
from pathlib import Path

import pytest

from tests.gating.examples import CONVERSATIONS
from ultrafuser.gating.model.fusion import inspect_fusion, load_fusion
from ultrafuser.gating.model.schema import SpeculationSettings
from ultrafuser.server.__main__ import EXIT_WRONG_INPUT, main

NAMES = ["text", "code", "math"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def files(folder: Path) -> list[str]:
    """The examples as one file for each domain, without their `domain`."""
    rows = [json.loads(line) for line in CONVERSATIONS.read_text().splitlines()]
    for name in NAMES:
        own = [json.dumps({"messages": row["messages"]}) for row in rows if row["domain"] == name]
        (folder / name).write_text("\n".join(own))
    return [f"{name}={folder / name}" for name in NAMES]


def test_losses_are_printed_as_a_table_and_written_as_json(tiny_path, tmp_path, cache, capsys):
    text, code, math = files(tmp_path)
    argv = ["eval", str(tiny_path), "--loss", "--data", text, "--data", code, "--data", math, "--limit", "5"]
    assert main([*argv, "--cache", str(cache), "--json", str(tmp_path / "new" / "loss.json")]) == 0
    found = json.loads((tmp_path / "new" / "loss.json").read_text())
    assert found.keys() == {"loss", "gate"}
    assert list(found["loss"]) == [*NAMES, "uniform", "fused"]
    for row in found["loss"].values():
        assert list(row) == [*NAMES, "mean"]
        assert row["mean"] == pytest.approx(sum(row[name] for name in NAMES) / 3)
    for weights in found["gate"].values():
        assert list(weights) == NAMES
        assert sum(weights.values()) == pytest.approx(1, abs=1e-5)
    out = capsys.readouterr().out
    assert "| nats per response token | text | code | math | mean |" in out
    assert f"{found['loss']['fused']['mean']:.4f}" in out
    assert "against the best specialist" in out


def test_a_baselines_rows_are_marked(tiny_path, tmp_path, cache):
    argv = ["eval", str(tiny_path), "--loss", "--data", str(CONVERSATIONS), "--limit", "2", "--cache", str(cache)]
    assert main([*argv, "--baseline", str(tiny_path), "--json", str(tmp_path / "loss.json")]) == 0
    losses = json.loads((tmp_path / "loss.json").read_text())["loss"]
    assert all(losses[f"baseline:{name}"] == losses[name] for name in [*NAMES, "uniform", "fused"])


def test_variants_are_fusion_files_of_one_model_each(tiny_path, tmp_path, cache, capsys):
    assert main(["eval", str(tiny_path), "--variants", str(tmp_path / "out"), "--cache", str(cache)]) == 0
    written = sorted((tmp_path / "out").iterdir())
    assert [path.stem for path in written] == ["code", "math", "text"]
    assert capsys.readouterr().out.split() == [str(tmp_path / "out" / f"{name}.yaml") for name in NAMES]
    fusion = load_fusion(written[0])
    assert (fusion.name, fusion.specialist_names, fusion.gate) == ("tiny-code", ("code",), None)
    assert fusion.eos_token_ids == load_fusion(tiny_path).eos_token_ids


def test_a_fusion_with_a_draft_head_is_measured_as_without(tiny_path, with_head, tmp_path, cache):
    found = []
    for fusion in (tiny_path, with_head):
        argv = ["eval", str(fusion), "--loss", "--data", str(CONVERSATIONS), "--limit", "2", "--base", base_of(fusion)]
        # A cache of its own: what was computed before would not be loaded again.
        argv += ["--cache", str(tmp_path / fusion.parent.name), "--json", str(tmp_path / "loss.json")]
        assert main(argv) == 0
        found.append(json.loads((tmp_path / "loss.json").read_text()))
    assert "base" in found[0]["loss"]
    assert found[0] == found[1]


def base_of(fusion: Path) -> str:
    return str(fusion.parent / "text")


def test_variants_of_a_fusion_with_a_draft_head_can_be_served(with_head, tmp_path, cache):
    assert main(["eval", str(with_head), "--variants", str(tmp_path / "out"), "--cache", str(cache)]) == 0
    for path in (tmp_path / "out").iterdir():
        variant = load_fusion(path)
        assert variant.engine.speculation == SpeculationSettings(max_tokens=3)
        assert inspect_fusion(variant).hidden_sizes == (64,)


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["demo"], "--loss: nothing to do"),
        (["--loss", "--data", "x"], "which fusion?"),
        (["--benchmark", "gsm8k=x"], "--output: answers are kept"),
        (["demo", "--benchmark", "gsm8k=x", "--output", "o"], "--benchmark: a running server is asked"),
        (["--benchmark", "gsm9k=x", "--output", "o"], "gsm9k"),
        (["demo", "--loss"], "--data: --loss needs conversations"),
        (["demo", "--loss", "--data", "none.jsonl"], "none.jsonl: no such data file"),
        (["demo", "--loss", "--data", "x", "--limit", "0"], "--limit: "),
        (["demo", "--los"], "unrecognized arguments: --los"),
    ],
)
def test_mistakes_are_one_line_and_exit_status_2(argv, complaint, capsys):
    assert main(["eval", *argv]) == EXIT_WRONG_INPUT
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("ultrafuser: ")
    assert complaint in line
