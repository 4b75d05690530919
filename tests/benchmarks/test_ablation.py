"""The ablation's arms differ in what they are named for and in nothing else. Real short runs on a tiny fusion."""

import json
from pathlib import Path

import pytest

from benchmarks.ablation import main, summarise
from tests.fakes import write_tiny_fusion
from tests.gating.examples import CONVERSATIONS


def settings_of(folder: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads((folder / "manifest.json").read_text())["settings"]
    return content


@pytest.mark.long
def test_three_arms_end_with_the_same_budget_and_are_summarised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ULTRAFUSER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    data = [str(CONVERSATIONS)]
    argv = [str(write_tiny_fusion(tmp_path / "tiny")), "--data", *data, "--eval-data", *data, "--seeds", "0"]
    argv += ["--output", str(tmp_path / "out"), "--stage1-steps", "2", "--stage2-steps", "2", "--stage1-limit", "5"]
    main(argv)
    direct, plain, balanced = [
        settings_of(tmp_path / "out" / f"{arm}-0" / "stage2") for arm in ("direct", "two-stage", "two-stage-balanced")
    ]
    differing = {"fusion", "output", "sampling", "fresh_gate"}
    assert {name for name in direct if direct[name] != balanced[name]} == differing
    assert {name for name in plain if plain[name] != balanced[name]} == differing - {"fresh_gate"}
    assert (direct["sampling"], direct["fresh_gate"], balanced["sampling"]) == ("proportional", True, "balanced")
    assert not (tmp_path / "out" / "direct-0" / "stage1").exists()
    summary = json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == summary["arms"]
    assert sum(summary["rows"].values()) == len(CONVERSATIONS.read_text().splitlines())
    losses = [arm["eval_loss"]["mean"] for arm in summary["arms"].values()]
    assert len(set(losses)) == 3
    written = (tmp_path / "out" / "direct-0" / "stage2" / "manifest.json").stat().st_mtime_ns
    main(argv)
    assert (tmp_path / "out" / "direct-0" / "stage2" / "manifest.json").stat().st_mtime_ns == written, "done once"


def test_a_summary_has_every_seeds_value_and_their_spread() -> None:
    summary = summarise([{"eval_loss": 1.0}, {"eval_loss": 2.0}, {"eval_loss": 3.0}])
    assert summary == {"eval_loss": {"values": [1.0, 2.0, 3.0], "mean": 2.0, "stdev": 1.0}}
    assert summarise([{"eval_loss": 1.0}])["eval_loss"]["stdev"] is None
