"""A result survives its file, has a plot beside it, and becomes a table; the page in docs/ is what the files say."""

import json
from pathlib import Path

import pytest

from benchmarks.environment import describe_environment
from benchmarks.measure import Bar, Comparison, Measured
from benchmarks.report import NAMES, PAGE, render_page
from benchmarks.result import RESULTS_FOLDER, Question, Result, newest_result, read_result

QUESTION = Question(
    name="decode_step",
    text="How quick?",
    fused="ours",
    baseline="theirs",
    ratio="ours / theirs",
    method="Side by side.",
)


@pytest.fixture
def result() -> Result:
    comparisons = (
        Comparison(
            case="batch 1",
            unit="ms per step",
            fused=Measured.of([0.1012, 0.103], scale=1000),
            baseline=Measured.of([0.1], scale=1000),
            ratio=1.021,
            bar=Bar(limit=1.05, direction="at most"),
        ),
        Comparison(
            case="batch 8",
            unit="tokens/s",
            fused=Measured(value=1234.5),
            baseline=None,
            ratio=None,
            note="at night",
        ),
    )
    environment = describe_environment("benchmarks.decode_step", ["--fusion", "a b.yaml"])
    return Result(question=QUESTION, date="2030-01-02", comparisons=comparisons, environment=environment)


def test_the_summary_has_what_a_script_reads(result: Result) -> None:
    assert result.summary == {
        "name": "decode_step",
        "ratios": {"batch_1": 1.021, "batch_8": None},
        "bars": {"batch_1": {"at most": 1.05}},
        "ok": True,
    }


def test_a_result_is_read_back_as_it_was_and_has_a_plot(result: Result, tmp_path: Path) -> None:
    path = result.write(tmp_path / "results")
    assert path.name == "2030-01-02-decode_step.json"
    assert read_result(path) == result
    assert json.loads(path.read_text())["ok"] is True
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_the_newest_result_of_a_name_is_found(result: Result, tmp_path: Path) -> None:
    result.write(tmp_path)
    newest = result.model_copy(update={"date": "2030-02-01"}).write(tmp_path)
    (tmp_path / "2031-01-01-other_decode_step.json").write_text("{}")
    assert newest_result(tmp_path, "decode_step") == newest
    assert newest_result(tmp_path, "peers") is None


def test_the_environment_names_the_command_and_the_versions(result: Result) -> None:
    environment = result.environment
    assert environment.command == "python -m benchmarks.decode_step --fusion 'a b.yaml'"
    assert {"python", "torch", "transformers", "ultrafuser"} <= environment.versions.keys()
    assert "cores" in environment.hardware
    assert "GiB" in environment.hardware


def test_the_page_has_a_table_of_each_result_and_says_what_is_missing(result: Result, tmp_path: Path) -> None:
    result.write(tmp_path / "results")
    page = render_page(tmp_path / "results", tmp_path / "results.md")
    assert "| batch 1 | ms per step | 102 | 102 | 103 | 100 | 100 | 100 | **1.02** | at most 1.05 | yes |" in page
    assert "| batch 8 (at night) | tokens/s | 1234 | - | - | - | - | - | **-** | - | - |" in page
    assert "![decode_step](results/2030-01-02-decode_step.png)" in page
    assert "Run `python -m benchmarks.peers`" in page
    headings = [line for line in page.splitlines() if line.startswith("## ")]
    assert headings == [f"## {name}" for name in ("quality", *NAMES, "soak")]


def test_a_missed_bar_is_seen_on_the_page(result: Result, tmp_path: Path) -> None:
    missed = result.comparisons[0].model_copy(update={"ratio": 1.2})
    result.model_copy(update={"comparisons": (missed,)}).write(tmp_path)
    assert "| **1.20** | at most 1.05 | **no** |" in render_page(tmp_path, tmp_path / "results.md")


def test_the_page_in_the_repository_is_what_the_result_files_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == render_page(RESULTS_FOLDER), "run `python -m benchmarks.report`"
