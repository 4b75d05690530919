"""Fixtures of the benchmarks' tests."""

from pathlib import Path

import pytest

from tests.gating.evaluation.runner import Runner
from ultrafuser.gating.commands import endpoint


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "FIRST_PAUSE_SECONDS", 0.01)


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    return Runner(tmp_path)
