"""Training end to end on tiny models: what learns, what must not, resumption, stops, and what comes out."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from gating.batches import collate_rows
from gating.fusion import load_fusion
from gating.gate import load_gate
from gating.inputs import gather_inputs
from gating.materialize import materialize
from gating.modeling import UltraFuserForCausalLM
from gating.train import train
from gating.trainer import FusedTrainer, NonFiniteLossError
from gating.training_settings import RUN_FOLDER, TrainError, TrainSettings
from tests.gating.examples import CONVERSATIONS

NAMES = ("text", "code", "math")
Train = Callable[..., Path]


@pytest.fixture(scope="session")
def train_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("train-cache")


@pytest.fixture
def settings_of(tiny_path: Path, tmp_path: Path, train_cache: Path) -> Callable[..., TrainSettings]:
    def make(**changes: Any) -> TrainSettings:
        options: dict[str, Any] = {
            "fusion": str(tiny_path),
            "data": [str(CONVERSATIONS)],
            "output": str(tmp_path / "out"),
            "cache": str(train_cache),
            "steps": 4,
            "rows_per_domain": 4,
            "learning_rate": 3e-3,
            "eval_every": 1000,
            "log_every": 1,
            "precision": "float32",
        }
        return TrainSettings(**(options | changes))

    return make


@pytest.fixture
def run(settings_of: Callable[..., TrainSettings]) -> Train:
    def start(**changes: Any) -> Path:
        path = train(settings_of(**changes))
        assert path is not None
        return path

    return start


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    """All of a fusion's weights, as the reference loads them (adapters merged)."""
    config = materialize(load_fusion(path), path.parent / "merged", on_progress=lambda step, share: None)
    return UltraFuserForCausalLM.from_fusion(config).state_dict()


def loss_of(path: Path, settings: TrainSettings) -> float:
    """The reference's own loss of the fusion on the training rows."""
    config = materialize(load_fusion(path), path.parent / "merged", on_progress=lambda step, share: None)
    rows = gather_inputs(settings).rows.dataset
    batch = collate_rows([rows[index] for index in range(len(rows))])
    batch.pop("labels")
    with torch.no_grad():
        loss = UltraFuserForCausalLM.from_fusion(config)(**batch).loss
    assert loss is not None
    return float(loss)


def losses_in(output: Path) -> list[float]:
    history = json.loads((output / "manifest.json").read_text())["history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def test_stage_1_leaves_the_specialists_in_memory_bit_identical(tiny_path, run, monkeypatch):
    learners = []
    start = FusedTrainer.__init__

    def watched(self: FusedTrainer, learner: Any, *rest: Any, **options: Any) -> None:
        learners.append(learner)
        start(self, learner, *rest, **options)

    monkeypatch.setattr(FusedTrainer, "__init__", watched)
    run(stage=1, steps=6, learning_rate=1e-2)
    (learner,) = learners
    untrained = UltraFuserForCausalLM.from_fusion(load_fusion(tiny_path))
    for name, tensor in untrained.specialists.state_dict().items():
        assert torch.equal(learner.specialists.state_dict()[name], tensor), name
    assert untrained.fusion_gate is not None
    moved = learner.fusion_gate.state_dict()
    assert all(
        not torch.equal(moved[name], tensor)
        for name, tensor in untrained.fusion_gate.state_dict().items()
        if name != "score.bias"
    )
    assert not any(parameter.grad is not None for parameter in learner.specialists.parameters())


def test_stage_1_lowers_the_references_loss_and_writes_nothing_but_a_gate(tiny_path, run, settings_of):
    path = run(stage=1, fresh_gate=True, steps=30, learning_rate=1e-2)
    before, after = weights_of(tiny_path), weights_of(path)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("fusion_gate.") for name in changed)
    fresh = load_fusion(tiny_path).model_copy(update={"gate": "package:fresh"})
    untrained = UltraFuserForCausalLM.from_fusion(fresh)
    rows = gather_inputs(settings_of(stage=1)).rows.dataset
    batch = collate_rows([rows[index] for index in range(len(rows))])
    batch.pop("labels")
    with torch.no_grad():
        start = float(untrained(**batch).loss)
    assert loss_of(path, settings_of(stage=1)) < start - 0.5


def test_stage_1_keeps_no_graph_through_the_specialists(tiny_path, settings_of, monkeypatch):
    from gating import learner

    seen = []
    whole = learner.response_states

    def watched(*arguments: Any) -> torch.Tensor:
        seen.append(whole(*arguments))
        return seen[-1]

    monkeypatch.setattr(learner, "response_states", watched)
    train(settings_of(stage=1, steps=1))
    assert seen
    assert not any(states.requires_grad for states in seen)


def test_cached_states_give_the_same_gate_as_computing_them_in_every_step(run, tmp_path):
    whole = run(stage=1, output=str(tmp_path / "whole"), eval_data=[str(CONVERSATIONS)])
    cached = run(stage=1, output=str(tmp_path / "cached"), eval_data=[str(CONVERSATIONS)], cache_states=True)
    # The same states from batches of another make-up: sums in another order. The softmax over specialists takes no
    # notice of the last bias: its gradient is rounding alone, which AdamW makes a step of.
    for name, tensor in load_file(whole.parent / "gate.safetensors").items():
        if name == "score.bias":
            continue
        torch.testing.assert_close(load_file(cached.parent / "gate.safetensors")[name], tensor, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(losses_in(cached.parent), losses_in(whole.parent), rtol=1e-4, atol=0)
    metrics = [json.loads((path.parent / "manifest.json").read_text())["metrics"] for path in (whole, cached)]
    assert metrics[0].keys() == metrics[1].keys()
    torch.testing.assert_close(list(metrics[1].values()), list(metrics[0].values()), rtol=1e-3, atol=1e-3)


def test_cached_states_need_no_specialist_in_a_second_run(run, tmp_path, monkeypatch):
    run(stage=1, cache_states=True, output=str(tmp_path / "first"))
    monkeypatch.setattr("gating.specialists.load_frozen", lambda *_: pytest.fail("a specialist was loaded"))
    run(stage=1, cache_states=True, output=str(tmp_path / "second"))
    gates = [load_file(tmp_path / name / "gate.safetensors") for name in ("first", "second")]
    assert all(torch.equal(tensor, gates[1][name]) for name, tensor in gates[0].items())


def test_stage_2_by_adapters_overfits_one_batch_and_the_reference_loads_the_result(run, settings_of):
    options: dict[str, Any] = {"stage": 2, "limit": 2, "rows_per_domain": 2}
    path = run(**options, steps=40, learning_rate=2e-2)
    losses = losses_in(path.parent)
    assert losses[-1] < 0.25 * losses[0]
    assert loss_of(path, settings_of(**options)) == pytest.approx(losses[-1], rel=0.2, abs=0.3)
    config = load_fusion(path)
    assert [Path(str(item.adapter)).relative_to(path.parent.resolve()) for item in config.specialists] == [
        Path("adapters") / name for name in NAMES
    ]


def test_stage_2_trains_gate_and_all_specialists_from_a_stage_1_result(tiny_path, run, tmp_path):
    first = run(stage=1, output=str(tmp_path / "first"))
    second = run(stage=2, fusion=str(first), output=str(tmp_path / "second"))
    before, after = weights_of(first), weights_of(second)
    changed = {name.rpartition(".layers")[0] for name in before if not torch.equal(before[name], after[name])}
    assert {f"specialists.{index}.model" for index in range(3)} <= changed
    assert not torch.equal(before["fusion_gate.score.weight"], after["fusion_gate.score.weight"])
    untouched = [f"specialists.{index}.lm_head.weight" for index in range(3)]
    assert all(torch.equal(before[name], after[name]) for name in untouched), "adapters leave the output layer alone"


def test_stage_2_goes_on_from_the_fusions_own_adapters(run, tmp_path):
    first = run(stage=2, steps=6, output=str(tmp_path / "first"), lora_rank=2, learning_rate=1e-2)
    second = run(stage=2, steps=6, fusion=str(first), output=str(tmp_path / "second"), learning_rate=1e-2)
    config = json.loads((second.parent / "adapters" / "math" / "adapter_config.json").read_text())
    assert config["r"] == 2
    # The cosine of the first run has ended near zero: the second starts where the first one was, not anew.
    assert losses_in(second.parent)[0] < losses_in(first.parent)[0] - 0.5


def test_stage_2_in_full_writes_plain_model_folders(run, settings_of):
    path = run(stage=2, learn="full", learning_rate=1e-3, steps=8)
    losses = losses_in(path.parent)
    assert losses[-1] < losses[0]
    config = load_fusion(path)
    assert [item.adapter for item in config.specialists] == [None] * 3
    for item in config.specialists:
        assert Path(item.model).is_relative_to(path.parent.resolve())
        assert len(AutoTokenizer.from_pretrained(item.model)) >= 320
    assert loss_of(path, settings_of(stage=2)) < losses[0]


def test_gradient_checkpointing_changes_memory_and_not_the_result(run, tmp_path):
    losses = [
        losses_in(run(stage=2, gradient_checkpointing=flag, output=str(tmp_path / str(flag))).parent)
        for flag in (False, True)
    ]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=0)


def test_micro_batches_add_up_to_the_whole_batch(run, tmp_path):
    """The step's tokens, not each micro-batch's, divide the sum: responses of unequal length count as in one batch."""
    losses = [
        losses_in(run(stage=1, micro_rows_per_domain=size, output=str(tmp_path / str(size))).parent) for size in (4, 1)
    ]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=0)


def test_bfloat16_trains_with_the_gate_and_adapters_in_float32(run):
    path = run(stage=2, precision="bfloat16", steps=10, learning_rate=1e-2)
    losses = losses_in(path.parent)
    assert losses[-1] < losses[0] - 0.5
    newest = max((path.parent / RUN_FOLDER).glob("checkpoint-*"), key=lambda folder: folder.stat().st_mtime)
    assert {tensor.dtype for tensor in load_file(newest / "trained.safetensors").values()} == {torch.float32}


def test_one_specialist_alone_learns_in_its_own_template_and_the_others_stay(tiny_path, run):
    path = run(specialist="code", domains=["code"], steps=12, learning_rate=1e-2)
    losses = losses_in(path.parent)
    assert losses[-1] < losses[0] - 0.5
    before, after = load_fusion(tiny_path), load_fusion(path)
    assert [item.adapter is not None for item in after.specialists] == [False, True, False]
    assert after.specialists[0] == before.specialists[0]
    assert after.gate == before.gate
    config = json.loads((path.parent / "manifest.json").read_text())["settings"]
    assert config["specialist"] == "code"


@pytest.mark.parametrize("options", [{"stage": 1}, {"stage": 2, "lora_dropout": 0.3}], ids=["gate", "adapters"])
def test_a_resumed_run_ends_bit_for_bit_where_an_uninterrupted_one_does(
    run, settings_of, tmp_path, monkeypatch, options
):
    common = {**options, "steps": 4, "save_every": 2, "eval_every": 2, "eval_data": [str(CONVERSATIONS)]}
    whole = run(**common, output=str(tmp_path / "whole"))
    stopped = tmp_path / "stopped"
    _stop_after(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        train(settings_of(**common, output=str(stopped)))
    monkeypatch.undo()
    assert [folder.name for folder in (stopped / RUN_FOLDER).glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (stopped / "fusion.yaml").exists()
    resumed = run(**common, output=str(stopped), resume=True)
    last = f"{RUN_FOLDER}/checkpoint-4/trained.safetensors"
    ours, theirs = [load_file(path.parent / last) for path in (resumed, whole)]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
    assert losses_in(resumed.parent) == losses_in(whole.parent)


def _stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Ctrl-C in the middle of a step, between two checkpoints."""
    step = FusedTrainer.training_step

    def interrupted(self: FusedTrainer, *arguments: Any) -> torch.Tensor:
        if self.state.global_step == steps:
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(FusedTrainer, "training_step", interrupted)


def test_a_run_is_resumed_with_its_own_settings_or_not_at_all(run, settings_of):
    run(stage=1)
    with pytest.raises(TrainError, match="has checkpoints of a run; add --resume, or name another folder"):
        train(settings_of(stage=1))
    with pytest.raises(TrainError, match=r"--learning-rate: the run to resume had 0\.003, now it is 0\.1"):
        train(settings_of(stage=1, learning_rate=0.1, resume=True))


def test_a_loss_that_is_not_finite_stops_before_the_optimizer_moves(run, settings_of, monkeypatch, tmp_path):
    from gating.learner import Learner

    forward = Learner.forward
    calls: list[int] = []

    def poisoned(self: Learner, **batch: Any) -> dict[str, torch.Tensor]:
        output = forward(self, **batch)
        calls.append(1)
        return output if len(calls) < 3 else {**output, "loss": output["loss"] * float("nan")}

    monkeypatch.setattr(Learner, "forward", poisoned)
    moved: list[int] = []
    move = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *rest: moved.append(1) or move(self, *rest))  # type: ignore[func-returns-value]
    with pytest.raises(NonFiniteLossError, match=r"step 3: the loss is nan .*Lower --learning-rate"):
        train(settings_of(stage=1, save_every=1))
    assert len(moved) == 2
    checkpoints = sorted(folder.name for folder in (tmp_path / "out" / RUN_FOLDER).glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-1", "checkpoint-2"]
    assert all(
        bool(torch.isfinite(tensor).all())
        for tensor in load_file(tmp_path / "out" / RUN_FOLDER / "checkpoint-2" / "trained.safetensors").values()
    )


def test_checkpoints_say_where_they_come_from_and_are_whole_or_absent(run):
    path = run(stage=1, save_every=1, keep_checkpoints=2, seed=5)
    folder = path.parent / RUN_FOLDER
    assert sorted(item.name for item in folder.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    assert not (folder / ".partial").exists()
    assert {name.name for name in (folder / "checkpoint-4").iterdir()} >= {
        "trained.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "provenance.json"
    }  # fmt: skip
    provenance = json.loads((folder / "checkpoint-4" / "provenance.json").read_text())
    assert provenance["settings"]["seed"] == 5
    assert provenance["step"] == 4
    assert set(provenance["data_sha256"]) == {"conversations.jsonl"}
    assert provenance["versions"]["torch"] == torch.__version__
    assert provenance["argv"]
    assert [item["name"] for item in provenance["models"]] == list(NAMES)
    gate = set(load_file(folder / "checkpoint-4" / "trained.safetensors"))
    assert all(name.startswith("fusion_gate.") for name in gate), "what is frozen is in no checkpoint"


def test_evaluation_gives_each_domains_loss_and_mean_gate_weights_weighted_by_tokens(tiny_path, run, settings_of):
    path = run(stage=1, eval_data=[str(CONVERSATIONS)], micro_rows_per_domain=1, steps=2)
    metrics = json.loads((path.parent / "manifest.json").read_text())["metrics"]
    rows = gather_inputs(settings_of(stage=1)).rows
    model = UltraFuserForCausalLM.from_fusion(load_fusion(path))
    for domain in NAMES:
        batch = collate_rows([rows.dataset[index] for index in rows.indices(domain)])
        batch.pop("labels")
        with torch.no_grad():
            output = model(**batch)
        assert metrics[f"eval_loss_{domain}"] == pytest.approx(float(output.loss), rel=1e-4)
        is_token = output.labels != -100
        for index, name in enumerate(NAMES):
            wanted = float(output.gate_weights[index][is_token].mean())
            assert metrics[f"eval_gate_{domain}_{name}"] == pytest.approx(wanted, abs=1e-4)
    assert metrics["eval_loss"] == pytest.approx(sum(metrics[f"eval_loss_{domain}"] for domain in NAMES) / 3)


def test_training_writes_a_tensorboard_log_and_counts_epochs_per_domain(run):
    path = run(stage=1, eval_data=[str(CONVERSATIONS)])
    assert list((path.parent / RUN_FOLDER).rglob("events.out.tfevents.*"))
    history = json.loads((path.parent / "manifest.json").read_text())["history"]
    assert [entry["epochs_math"] for entry in history if "loss" in entry] == [0.4, 0.8, 1.2, 1.6]


def test_a_plan_says_what_would_be_trained_and_loads_no_weights(settings_of, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("gating.specialists.load_frozen", lambda *_: pytest.fail("weights were loaded"))
    assert train(settings_of(stage=2, plan=True, steps=100)) is None
    said = capsys.readouterr().err
    assert "text: 10 rows" in said
    assert "gate: 33,793 parameters, all learn" in said
    assert "steps: 100 of 4 rows x 3 domains, 4 rows of each at a time on 1 process(es)" in said
    assert "code: 10 rows, 40.00 epochs" in said
    assert "computed, not measured" in said
    assert not (tmp_path / "out").exists()


def test_the_plan_counts_the_parameters_that_then_learn(settings_of, tiny_path, run, capsys):
    path = run(stage=2, steps=1)
    said = capsys.readouterr().err
    trained = load_file(path.parent / RUN_FOLDER / "checkpoint-1" / "trained.safetensors")
    for index, name in enumerate(NAMES):
        own = sum(tensor.numel() for key, tensor in trained.items() if key.startswith(f"specialists.{index}."))
        assert f"parameters, {own:,} learn" in next(
            line for line in said.splitlines() if line.startswith(f"{name}: ") and "learn" in line
        )


def test_a_missing_gate_file_is_no_hindrance_to_stage_1(tiny_copy, run):
    (tiny_copy.parent / "gate.safetensors").unlink()
    path = run(fusion=str(tiny_copy), stage=1)
    assert load_gate(path.parent / "gate.safetensors", NAMES, [64, 64, 64]).width == 512


def test_specialists_of_unequal_width_are_trained_too(run, tmp_path):
    from tests.fakes import write_tiny_fusion

    path = write_tiny_fusion(tmp_path / "unequal", hidden_sizes=(64, 96, 32))
    result = run(fusion=str(path), stage=1, cache_states=True, fresh_gate=True, steps=20, learning_rate=1e-3)
    losses = losses_in(result.parent)
    assert sum(losses[-5:]) < sum(losses[:5])


def test_a_result_can_be_moved(run, tmp_path, settings_of):
    path = run(stage=2, steps=2)
    moved = tmp_path / "elsewhere"
    shutil.copytree(path.parent, moved, ignore=shutil.ignore_patterns("merged", RUN_FOLDER))
    assert [Path(str(item.adapter)).parent for item in load_fusion(moved).specialists] == [moved / "adapters"] * 3
    assert weights_of(moved / "fusion.yaml").keys() == weights_of(path).keys()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({}, "stage: name either a stage"),
        ({"stage": 1, "specialist": "code"}, "stage: name either a stage"),
        ({"stage": 2, "cache_states": True}, "cache_states: only stage 1 can cache"),
        ({"specialist": "law"}, "--specialist: 'law' is not in the fusion; it has text, code, math"),
        ({"stage": 1, "max_length": 5000}, "--max-length: 5000 is more than the fusion's 1024"),
        ({"stage": 1, "rows_per_domain": 4, "micro_rows_per_domain": 3}, "use a multiple of 3"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_line(settings_of, changes, complaint):
    with pytest.raises(ValueError, match=complaint) as caught:
        train(settings_of(**changes))
    assert complaint in str(caught.value)
