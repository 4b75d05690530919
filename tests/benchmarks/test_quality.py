"""What evaluation wrote becomes one dated result and one section of the page, with nothing rounded away."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.ablation import summarise
from benchmarks.quality import Quality, describe, main
from benchmarks.report import render_page


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "loss.md").write_text("| nats | text |\n| --- | ---: |\n| fused | 1.2345 |\n")
    metrics = [{f"eval_loss{suffix}": value for suffix in ("", "_text", "_code", "_math")} for value in (1.5, 1.7)]
    budget = {
        "stage1_steps": 60, "stage2_steps": 30, "rows_per_domain": 2, "learning_rate": 3e-4,
        "gate_learning_rate": 1e-3, "stage1_limit": 100, "max_length": 320,
    }  # fmt: skip
    content = {
        "budget": budget,
        "rows": {"text": 1200, "code": 30},
        "seeds": [0, 1],
        "arms": {"direct": summarise(metrics)},
    }
    (tmp_path / "ablation.json").write_text(json.dumps(content))
    score: dict[str, Any] = {"value": 0.25, "low": 0.1, "high": 0.5, "num_items": 8}
    for name, own in (("base", {"gsm8k": score}), ("fused", {"gsm8k": score, "humaneval": {"value": None}})):
        (tmp_path / name).mkdir()
        shared = {"chain_of_thought": False, "limit": 8, "max_tokens": 512}
        (tmp_path / name / "results.json").write_text(json.dumps({**shared, "benchmarks": own}))
    return tmp_path


def test_a_filing_becomes_a_section_of_the_page(files: Path) -> None:
    results = files / "results"
    results.mkdir()
    path = main([
        "--losses", str(files / "loss.md"), "--ablation", str(files / "ablation.json"), "--results", str(results),
        "--scores", f"base={files / 'base'}", f"fused={files / 'fused'}",
    ])  # fmt: skip
    page = render_page(results, files / "page.md")
    assert "| fused | 1.2345 |" in page
    assert "| direct | 1.6000 ± 0.1414 |" in page
    assert "1.5000 1.7000 |" in page
    assert "| fused | 25.0 [10.0, 50.0] of 8 | - |" in page
    assert "30 steps of stage 2 on 2 x 3 rows" in page
    assert "Training rows: 1,200 text, 30 code;" in page
    assert str(files) not in path.read_text()


def test_parts_can_be_filed_one_after_the_other(files: Path) -> None:
    results = files / "results"
    results.mkdir()
    main(["--losses", str(files / "loss.md"), "--results", str(results)])
    path = main(["--ablation", str(files / "ablation.json"), "--results", str(results)])
    quality = Quality.model_validate_json(path.read_text())
    assert "1.2345" in quality.losses
    assert quality.ablation is not None
    assert "### Benchmarks" not in describe(quality)
