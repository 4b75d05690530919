"""Split placement against single engines side by side, on the tests' tiny models."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.placement import link_bandwidth
from tests.e2e.process import clean_environment
from tests.fakes import write_tiny_fusion


def test_a_link_is_measured() -> None:
    assert link_bandwidth(2**20) > 1e6


@pytest.mark.long
def test_every_part_is_measured_on_tiny_models(tmp_path: Path) -> None:
    path = str(write_tiny_fusion(tmp_path))
    command = [sys.executable, "-m", "benchmarks.placement", "--quick", "--fusion", path]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    ratios = json.loads(done.stdout)["ratios"]
    assert ratios["batch_1"] > 0
    assert ratios["exchange_of_logits_batch_1_against_its_bytes_over_the_link"] > 0
