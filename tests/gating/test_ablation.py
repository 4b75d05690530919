"""gating/demo/ablation.sh on tiny models: the kinds of gate side by side, and the same figures when run again."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.gating.examples import CONVERSATIONS

SCRIPT = Path(__file__).parents[2] / "gating" / "demo" / "ablation.sh"
FEW = ["--steps", "3", "--limit", "8", "--rows-per-domain", "2", "--precision", "float32", "--warmup-steps", "1"]


def figures(fusion: Path, data: Path, output: Path) -> Any:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(output.parent),
        "KINDS": "paper joint+scaled",
        "SEEDS": "0 1",
        "ROWS": "6",
    }
    command = ["bash", str(SCRIPT), str(fusion), str(data), str(output), *FEW]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:] + "".join(
        path.read_text()[-2000:] for path in output.glob("*.log")
    )
    assert "joint+scaled-1" in done.stdout
    return json.loads((output / "kinds.json").read_text())


@pytest.mark.long
def test_the_ablation_says_the_same_twice(tiny_path: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    rows = [json.loads(line) for line in CONVERSATIONS.read_text(encoding="utf-8").splitlines()]
    for domain in ("text", "code", "math"):
        own = "".join(json.dumps(row) + "\n" for row in rows if row["domain"] == domain)
        for part in ("train", "validation"):
            (data / f"{part}.{domain}.jsonl.gz").write_bytes(gzip.compress(own.encode()))
    first = figures(tiny_path, data, tmp_path / "first")
    assert figures(tiny_path, data, tmp_path / "second") == first
    assert {name: own["kind"] for name, own in first["gates"].items() if name != "fused"} == {
        f"gate:{kind}-{seed}": kind for kind in ("paper", "joint+scaled") for seed in (0, 1)
    }
    assert set(first["mixed_turns"]) >= {"oracle", "fused", "gate:paper-0"}
