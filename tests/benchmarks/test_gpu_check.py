"""The GPU check, as far as it runs without one: its parts on numbers, and the whole of it on the tiny model."""

import json
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu_check import CheckOptions, count_equal, measure, num_decided
from benchmarks.measure import Comparison
from tests.e2e.process import clean_environment


@pytest.mark.parametrize(
    ("answer", "expected", "equal"),
    [([1, 2, 3], [1, 2, 3], 3), ([1, 9, 3], [1, 2, 3], 1), ([1, 2, 3], [1, 2], 2), ([], [1], 0)],
)
def test_tokens_count_until_they_differ(answer: list[int], expected: list[int], equal: int) -> None:
    assert count_equal(answer, expected) == equal


def test_steps_count_until_the_reference_is_undecided() -> None:
    assert num_decided([0.5, 0.1, 1e-4, 0.5]) == 2
    assert num_decided([0.5, 0.1]) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_can_be_run() -> None:
    with pytest.raises(SystemExit, match="no GPU answers; --quick runs the part that needs none"):
        list(measure(CheckOptions()))


def test_one_part_can_be_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def noting(part: Callable[..., list[Comparison]], _options: CheckOptions) -> list[Comparison]:
        ran.append(part.__name__)
        return []

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "in_a_process_of_its_own", noting)
    for part in ("demo", None):
        assert not list(measure(CheckOptions(part=part)))
    assert ran == ["check_demo", "check_tiny", "check_tiny_with_drafts", "check_demo", "measure_drafts"]


@pytest.mark.long
def test_the_tiny_model_is_exact() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--quick"]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["ratios"]["tiny_equal_tokens"] == summary["ratios"]["tiny_with_drafts_equal_tokens"] == 1.0
    assert summary["ok"] is True
    assert summary["file"] is None
