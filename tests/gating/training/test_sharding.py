"""FSDP2 through accelerate: two processes of the CPU, each with a shard, train what one process trains.

All runs share one pair of processes, started by the real launcher with the shipped configuration; see `launched.py`.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from tests.gating.examples import CONVERSATIONS
from tests.gating.training.runs import loss_of, losses_in
from ultrafuser.gating.commands.run_folder import RUN_FOLDER
from ultrafuser.gating.errors import TrainError
from ultrafuser.gating.model.gate_kind import CHANGES
from ultrafuser.gating.training.command import train
from ultrafuser.gating.training.settings import TrainSettings, parse_settings
from ultrafuser.gating.training.sharding import configure_sharding

ROOT = Path(__file__).parents[3]
CONFIGURATIONS = ROOT / "gating" / "accelerate"
FULL, LORA = ["--stage", "2", "--learn", "full"], ["--stage", "2"]
KINDS = ["--stage", "1", "--fresh-gate", "--gate-kind", "+".join(CHANGES)]
OF_ONE_PROCESS = {"gate": ["--stage", "1"], "kinds": KINDS, "full": FULL, "lora": LORA, "tied": FULL}


class Runs:
    """Command lines of the runs, and where their results are."""

    def __init__(self, folder: Path, tiny_path: Path) -> None:
        self.folder = folder
        self._tiny_path = tiny_path

    def argv(self, name: str, options: list[str], *, processes: str) -> list[str]:
        """Seven evaluation rows a domain, three in a batch: one process has two batches, the other one."""
        fusion = self._tiny_path.parent if name != "tied" else self.folder / "tied-models"
        data = ["--data", str(CONVERSATIONS), "--eval-data", str(CONVERSATIONS), "--eval-limit", "7"]
        steps = ["--steps", "3", "--rows-per-domain", "4", "--micro-rows-per-domain", "1", "--learning-rate", "3e-3"]
        often = ["--log-every", "1", "--eval-every", "3", "--save-every", "1"]
        paths = ["--cache", str(self.folder / f"cache-{processes}"), "--output", str(self.output(name, processes))]
        precision = [] if "--precision" in options else ["--precision", "float32"]
        return [str(fusion / "fusion.yaml"), *data, *steps, *often, *paths, *precision, *options]

    def output(self, name: str, processes: str) -> Path:
        return self.folder / processes / name

    def manifest(self, name: str, processes: str) -> dict[str, Any]:
        return json.loads((self.output(name, processes) / "manifest.json").read_text())

    def trained(self, name: str, processes: str) -> dict[str, torch.Tensor]:
        return load_file(self.output(name, processes) / RUN_FOLDER / "checkpoint-3" / "trained.safetensors")

    def seen(self, name: str) -> list[dict[str, Any]]:
        """By the two processes."""
        return [json.loads((self.folder / "two" / f"{name}.{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def runs(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("sharded"), tiny_path)
    _write_tied(tiny_path.parent, runs.folder / "tied-models")
    jobs: list[dict[str, Any]] = [
        {"argv": runs.argv(name, options, processes="two")} for name, options in OF_ONE_PROCESS.items()
    ]
    jobs += [
        {"argv": runs.argv("stopped", FULL, processes="two"), "stop_at": 3},
        {"argv": runs.argv("stopped", [*FULL, "--resume"], processes="two")},
        {"argv": runs.argv("bfloat16", [*FULL, "--precision", "bfloat16"], processes="two")},
        {"argv": runs.argv("poisoned", FULL, processes="two"), "poison": [1, 2]},
    ]
    (runs.folder / "jobs.json").write_text(json.dumps(jobs))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file"]
    done = subprocess.run(
        [*launcher, str(CONFIGURATIONS / "fsdp2-cpu.yaml"), "-m", "tests.gating.training.launched",
         runs.folder / "jobs.json"],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "on 2 process(es)" in done.stderr
    return runs


def _write_tied(source: Path, target: Path) -> None:
    """The tiny models, one of which has its embedding as output layer."""
    shutil.copytree(source, target)
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(target / "code", tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(target / "code")


@pytest.mark.parametrize("name", OF_ONE_PROCESS)
def test_sharded_training_has_the_losses_of_one_process_and_ends_with_the_same_weights(runs, name):
    train(parse_settings(runs.argv(name, OF_ONE_PROCESS[name], processes="one")))
    one, two = runs.manifest(name, "one"), runs.manifest(name, "two")
    for key in ("loss", "eval_loss", "grad_norm"):
        found, wanted = [[entry[key] for entry in run["history"] if key in entry] for run in (two, one)]
        assert len(found) >= 2
        # The same sums of float32 in another order, over three optimizer steps.
        assert found == pytest.approx(wanted, rel=1e-4), key
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-3, abs=1e-4)
    ours, theirs = runs.trained(name, "two"), runs.trained(name, "one")
    # The softmax over specialists takes no notice of this bias: AdamW makes a step of its rounding.
    del ours["fusion_gate.score.bias"], theirs["fusion_gate.score.bias"]
    assert_close(ours, theirs, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("name", OF_ONE_PROCESS)
def test_each_process_holds_half_of_every_specialist_and_of_its_moments_and_the_gate_whole(runs, name):
    first, second = runs.seen(name)
    for parameter, (held, whole) in first["parameters"].items():
        if parameter.startswith("fusion_gate."):
            assert held == whole == second["parameters"][parameter][0], parameter
            continue
        assert held + second["parameters"][parameter][0] == whole, parameter
        # LoRA's eight rows, or a vocabulary of an odd number, are not always cut in the middle.
        assert abs(held - whole / 2) <= 0.01 * whole, parameter
    num_gate = sum(whole for key, (_, whole) in first["parameters"].items() if key.startswith("fusion_gate."))
    learns = sum(tensor.numel() for tensor in runs.trained(name, "two").values())
    for process in (first, second):
        assert sum(whole for _, whole in process["moments"]) == learns
        held = sum(held for held, _ in process["moments"])
        assert held == pytest.approx(num_gate + (learns - num_gate) / 2, rel=0.01)


def test_a_resumed_sharded_run_ends_bit_for_bit_where_an_uninterrupted_one_does(runs):
    assert runs.seen("stopped")[0]["ending"] == "done", "the second time"
    ours, theirs = runs.trained("stopped", "two"), runs.trained("full", "two")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert losses_in(runs.output("stopped", "two")) == losses_in(runs.output("full", "two"))
    evaluations = [entry for entry in runs.manifest("stopped", "two")["history"] if "eval_loss" in entry]
    assert len(evaluations) == 3, "it really had been stopped: resuming evaluates once more"


@pytest.mark.parametrize("name", ["full", "lora"])
def test_the_reference_loads_what_was_trained_in_shards_and_has_its_loss(runs, name):
    metrics = runs.manifest(name, "two")["metrics"]
    for domain in ("text", "code", "math"):
        options = [*OF_ONE_PROCESS[name], "--limit", "7", "--domains", domain]
        settings = parse_settings(runs.argv(name, options, processes="one"))
        found = loss_of(runs.output(name, "two") / "fusion.yaml", settings)
        assert found == pytest.approx(metrics[f"eval_loss_{domain}"], rel=1e-4)


def test_bfloat16_shards_keep_what_learns_in_float32_and_have_about_the_losses_of_float32(runs):
    assert {tensor.dtype for tensor in runs.trained("bfloat16", "two").values()} == {torch.float32}
    found, wanted = [losses_in(runs.output(name, "two")) for name in ("bfloat16", "full")]
    assert found == pytest.approx(wanted, rel=0.02)
    assert found != wanted


def test_a_loss_that_is_not_finite_in_one_process_ends_all_before_the_optimizer_moves(runs):
    endings = [process["ending"] for process in runs.seen("poisoned")]
    assert all(ending.startswith("NonFiniteLossError: step 2: the loss is nan") for ending in endings), endings
    checkpoints = (runs.output("poisoned", "two") / RUN_FOLDER).glob("checkpoint-*")
    assert [folder.name for folder in checkpoints] == ["checkpoint-1"]
    assert not (runs.output("poisoned", "two") / "fusion.yaml").exists()


def test_a_sharded_run_is_resumed_sharded_or_not_at_all(runs, tmp_path):
    shutil.copytree(runs.output("gate", "two"), tmp_path / "gate")
    (tmp_path / "gate" / "fusion.yaml").unlink()
    shutil.rmtree(tmp_path / "gate" / RUN_FOLDER / "checkpoint-3")
    argv = [*runs.argv("gate", OF_ONE_PROCESS["gate"], processes="two"), "--resume"]
    settings = TrainSettings(**{**parse_settings(argv).model_dump(), "output": str(tmp_path / "gate")})
    with pytest.raises(TrainError, match=r"checkpoint-2: was written with sharding, .* same accelerate configuration"):
        train(settings)


def test_the_configuration_for_gpus_is_the_tested_one_on_other_devices():
    gpu, cpu = [yaml.safe_load((CONFIGURATIONS / f"{name}.yaml").read_text()) for name in ("fsdp2", "fsdp2-cpu")]
    assert cpu.pop("use_cpu") is True
    assert (gpu.pop("num_processes"), cpu.pop("num_processes")) == (8, 2)
    assert gpu == cpu


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"fsdp_version": 1}, "fsdp_version: must be 2"),
        ({"cpu_ram_efficient_loading": True}, "fsdp_cpu_ram_efficient_loading: must be false"),
        ({"activation_checkpointing": True}, "fsdp_activation_checkpointing: use --gradient-checkpointing"),
    ],
)
def test_configurations_with_which_the_result_would_be_wrong_are_refused(changes, complaint):
    plugin = {"fsdp_version": 2, "cpu_ram_efficient_loading": False, "activation_checkpointing": False, **changes}
    state = SimpleNamespace(distributed_type="FSDP", fsdp_plugin=SimpleNamespace(**plugin))
    accelerator: Any = SimpleNamespace(state=state, mixed_precision="no")
    with pytest.raises(TrainError, match=f"{complaint}.*change it in accelerate's configuration"):
        configure_sharding(accelerator)
