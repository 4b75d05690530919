"""Several processes train what one trains: the real command, started twice over on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from tests.gating.examples import CONVERSATIONS
from tests.gating.training.test_newcomer import with_gate, write_law
from ultrafuser.gating.commands.run_folder import RUN_FOLDER
from ultrafuser.gating.model.gate_kind import CHANGES, GateKind
from ultrafuser.gating.training.command import train
from ultrafuser.gating.training.settings import parse_settings

ROOT = Path(__file__).parents[3]


def launch(module: str, *arguments: str) -> str:
    """Run a module in two processes; what they said on stderr."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environ = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*launcher, "-m", module, *arguments], env=environ, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


GATE = ["--stage", "2"]
HEAD = ["--drafter", "--draft-vocabulary", "20", "--draft-tokens", "3"]


KINDS = ["--stage", "2", "--fresh-gate", "--gate-kind", "+".join(CHANGES)]


@pytest.mark.parametrize("what", [GATE, HEAD, KINDS], ids=["gate", "head", "kinds"])
def test_two_processes_have_the_losses_of_one_and_end_with_the_same_weights(
    tiny_path: Path, tmp_path: Path, what: list[str]
) -> None:
    check_two_against_one(tiny_path, what, tmp_path)


def test_two_processes_let_a_newcomer_join_as_one_does(tiny_copy: Path, tmp_path: Path) -> None:
    law = write_law(tmp_path / "law")
    check_two_against_one(with_gate(tiny_copy, GateKind(joint=True)), ["--add", f"law={law}"], tmp_path)


def check_two_against_one(fusion: Path, what: list[str], tmp_path: Path) -> None:
    argv = [
        str(fusion), *what, "--data", str(CONVERSATIONS), "--eval-data", str(CONVERSATIONS),
        "--cache", str(tmp_path / "cache"), "--steps", "3", "--rows-per-domain", "4", "--micro-rows-per-domain", "1",
        "--learning-rate", "3e-3", "--log-every", "1", "--eval-every", "3", "--precision", "float32",
    ]  # fmt: skip
    train(parse_settings([*argv, "--output", str(tmp_path / "one")]))
    said = launch("gating.train", *argv, "--output", str(tmp_path / "two"))
    one, two = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("one", "two")]
    assert "on 2 process(es)" in said, "the second run must really have had two"
    for key in ("loss", "eval_loss", "grad_norm"):
        found, wanted = [[entry[key] for entry in run["history"] if key in entry] for run in (two, one)]
        assert len(found) >= 2
        # The same sums of float32 in another order, over three optimizer steps.
        assert found == pytest.approx(wanted, rel=1e-4), key
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-3, abs=1e-4)
    last = f"{RUN_FOLDER}/checkpoint-3/trained.safetensors"
    ours, theirs = (load_file(tmp_path / name / last) for name in ("two", "one"))
    # The softmax over specialists takes no notice of this bias: AdamW makes a step of its rounding.
    for weights in (ours, theirs):
        weights.pop("fusion_gate.score.bias", None)
    assert_close(ours, theirs, rtol=1e-2, atol=1e-4)


def test_a_process_evaluates_and_reads_states_on_as_many_rows_at_a_time_as_it_trains_on(
    tiny_path: Path, tmp_path: Path
) -> None:
    """Evaluation and cached states once took the rows of all processes together, sixteen times too many on sixteen."""
    data = ["--data", str(CONVERSATIONS), "--eval-data", str(CONVERSATIONS), "--cache", str(tmp_path / "cache")]
    argv = [str(tiny_path), "--stage", "1", *data, "--steps", "1", "--rows-per-domain", "4", "--precision", "float32"]
    runs = {"whole": [], "cached": ["--cache-states"]}
    jobs = [{"argv": [*argv, *more, "--output", str(tmp_path / name)]} for name, more in runs.items()]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    said = launch("tests.gating.training.launched", str(tmp_path / "jobs.json"))
    assert "2 rows of each at a time on 2 process(es)" in said
    seen = {
        name: [json.loads((tmp_path / f"{name}.{rank}.json").read_text())["most_rows"] for rank in (0, 1)]
        for name in runs
    }
    # Two rows of each of three domains; of a domain's ten rows each process has five to evaluate.
    assert seen["whole"] == [{"training": 6, "evaluation": 5}] * 2
    # A specialist's states are computed by the process that comes first; the other one may have come first nowhere.
    assert {"cached states": 6} in seen["cached"]
    assert all(most_rows in ({}, {"cached states": 6}) for most_rows in seen["cached"])
