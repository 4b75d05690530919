"""A training run as a process: resumption, stops, checkpoints, evaluation, its log and its plan."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.gating.examples import CONVERSATIONS
from tests.gating.training.runs import losses_in
from ultrafuser.gating.commands.run_folder import RUN_FOLDER
from ultrafuser.gating.data.batches import collate_rows
from ultrafuser.gating.errors import NonFiniteLossError, TrainError
from ultrafuser.gating.model.fusion import load_fusion
from ultrafuser.gating.model.gate import Gate
from ultrafuser.gating.model.reference import UltraFuserForCausalLM
from ultrafuser.gating.training import building
from ultrafuser.gating.training.command import train
from ultrafuser.gating.training.inputs import gather_inputs
from ultrafuser.gating.training.learner import FusedLearner
from ultrafuser.gating.training.plan import measure
from ultrafuser.gating.training.sampler import ProportionalBatches
from ultrafuser.gating.training.settings import parse_settings
from ultrafuser.gating.training.trainer import FusedTrainer

NAMES = ("text", "code", "math")


@pytest.mark.parametrize(
    "options", [{"stage": 1}, {"stage": 2, "lora_dropout": 0.3}, {"drafter": True}], ids=["gate", "adapters", "head"]
)
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


def test_a_draft_head_goes_on_only_with_the_tokens_that_its_columns_are(run, settings_of, monkeypatch):
    path = run(drafter=True, draft_vocabulary=20)
    provenance = json.loads((path.parent / RUN_FOLDER / "checkpoint-4" / "provenance.json").read_text())
    assert len(provenance["draft_vocabulary"]) == 64
    settings = settings_of(drafter=True, draft_vocabulary=20, resume=True)
    train(settings)
    monkeypatch.setattr(building, "draft_vocabulary", lambda *_: torch.arange(20))
    with pytest.raises(
        TrainError, match=r"checkpoint-4: its draft head guesses other tokens than .* in a new --output$"
    ):
        train(settings)


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


@pytest.mark.parametrize(
    "options",
    [{"stage": 1, "warmup_steps": 1, "eval_data": [str(CONVERSATIONS)]}, {"drafter": True, "draft_vocabulary": 20}],
    ids=["gate", "head"],
)
def test_the_settings_that_a_run_leaves_make_the_same_run_again_and_go_on_with_it(run, tmp_path, options):
    first = run(**options)
    config = first.parent / RUN_FOLDER / "config.yaml"
    again = parse_settings(["--config", str(config), "--output", str(tmp_path / "again")])
    train(again)
    last = f"{RUN_FOLDER}/checkpoint-4/trained.safetensors"
    ours, theirs = (load_file(folder / last) for folder in (tmp_path / "again", first.parent))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
    written = [(folder / RUN_FOLDER / "config.yaml").read_text() for folder in (tmp_path / "again", first.parent)]
    assert written[0] == written[1].replace(str(first.parent), str(tmp_path / "again"))
    assert "learning-rate: 0.003\n" in written[0]
    assert "\nresume:" not in written[0]
    assert train(parse_settings(["--config", str(config), "--resume"])) == first


def test_a_checkpoint_that_is_older_than_a_setting_had_its_default(run, settings_of):
    path = run(stage=1)
    provenance = path.parent / RUN_FOLDER / "checkpoint-4" / "provenance.json"
    content = json.loads(provenance.read_text())
    del content["lasting"]["sampling"]
    provenance.write_text(json.dumps(content))
    assert run(stage=1, resume=True) == path
    with pytest.raises(TrainError, match="--sampling: the run to resume had 'balanced', now it is 'proportional'"):
        train(settings_of(stage=1, sampling="proportional", resume=True))


def test_a_loss_that_is_not_finite_stops_before_the_optimizer_moves(run, settings_of, monkeypatch, tmp_path):
    from ultrafuser.gating.training.learner import Learner

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


@pytest.mark.parametrize("part", ["fusion_gate", "specialists.1"])
def test_a_part_that_gets_no_gradient_ends_the_run_before_the_optimizer_moves(settings_of, monkeypatch, tmp_path, part):
    """Else it would stay as it was, unsaid, on whichever path forgets it."""
    moved: list[int] = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_: moved.append(1))
    if part == "fusion_gate":
        weigh = Gate.forward
        monkeypatch.setattr(Gate, "forward", lambda *arguments: weigh(*arguments).detach())
    else:
        read = FusedLearner.hidden_states

        def cut(self: FusedLearner, **batch: Any) -> list[torch.Tensor]:
            first, second, *others = read(self, **batch)
            return [first, second.detach(), *others]

        monkeypatch.setattr(FusedLearner, "hidden_states", cut)
    with pytest.raises(TrainError, match=f"^step 1: {part} is to learn and gets no gradient; nothing was changed"):
        train(settings_of(stage=2))
    assert not moved
    assert not list((tmp_path / "out" / RUN_FOLDER).glob("checkpoint-*"))


def test_a_run_goes_on_although_some_of_a_part_has_no_optimizer_state(run, settings_of, tmp_path, monkeypatch):
    """AdamW keeps none for what never had a gradient: in a mixture of experts, say, one that no row has come to."""
    step = FusedTrainer.training_step

    def without(self: FusedTrainer, *arguments: Any) -> torch.Tensor:
        loss = step(self, *arguments)
        if self.state.global_step < 3:
            next(parameter for parameter in self.learner.parameters() if parameter.requires_grad).grad = None
        return loss

    common = {"stage": 1, "steps": 4, "save_every": 2}
    monkeypatch.setattr(FusedTrainer, "training_step", without)
    whole = run(**common, output=str(tmp_path / "whole"))
    stopped = tmp_path / "stopped"
    with monkeypatch.context() as patches:
        _stop_after(patches, 3)
        with pytest.raises(KeyboardInterrupt):
            train(settings_of(**common, output=str(stopped)))
    saved = torch.load(stopped / RUN_FOLDER / "checkpoint-2" / "optimizer.pt")
    num_parameters = sum(len(group["params"]) for group in saved["param_groups"])
    assert len(saved["state"]) == num_parameters - 1
    resumed = run(**common, output=str(stopped), resume=True)
    last = f"{RUN_FOLDER}/checkpoint-4/trained.safetensors"
    ours, theirs = [load_file(path.parent / last) for path in (resumed, whole)]
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


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


def test_proportional_sampling_reads_all_rows_alike_and_counts_epochs_of_the_union(
    run, settings_of, tmp_path, monkeypatch, capsys
):
    seen: list[list[int]] = []
    draw = ProportionalBatches.micro_batch

    def watched(self: ProportionalBatches, number: int) -> list[int]:
        seen.append(draw(self, number))
        return seen[-1]

    monkeypatch.setattr(ProportionalBatches, "micro_batch", watched)
    data = tmp_path / "uneven.jsonl"
    lines = CONVERSATIONS.read_text().splitlines(keepends=True)
    math = [line for line in lines if json.loads(line)["domain"] == "math"]
    data.write_text("".join([*(line for line in lines if line not in math), *math[:4]]))
    path = run(stage=1, sampling="proportional", steps=2, data=[str(data)])
    assert "2 of 12 rows of all 3 domains together, 12 rows at a time" in capsys.readouterr().err
    assert len({row for batch in seen for row in batch}) == sum(len(batch) for batch in seen) == 24
    history = json.loads((path.parent / "manifest.json").read_text())["history"]
    logged = [[entry[f"epochs_{name}"] for name in NAMES] for entry in history if "loss" in entry]
    assert logged == [[0.5] * 3, [1.0] * 3]


def test_a_plan_says_what_would_be_trained_and_loads_no_weights(settings_of, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("ultrafuser.gating.model.loading.load_frozen", lambda *_: pytest.fail("weights were loaded"))
    assert train(settings_of(stage=2, plan=True, steps=100)) is None
    said = capsys.readouterr().err
    assert "text: 10 rows" in said
    assert "gate (paper): 33,793 parameters, all learn" in said
    assert "steps: 100 of 4 rows x 3 domains, 4 rows of each at a time on 1 process(es)" in said
    assert "code: 10 rows, 40.00 epochs" in said
    assert "computed, not measured" in said
    assert not (tmp_path / "out").exists()


def test_the_plan_counts_evaluation_rows_for_the_disk_and_the_longest_sequence(
    settings_of, capsys, monkeypatch, tmp_path
):
    """It once counted training rows only."""
    monkeypatch.setattr("ultrafuser.gating.training.plan._GIB", 1)
    long = [{"role": "user", "content": "a " * 300}, {"role": "assistant", "content": "b"}]
    rows = [{"domain": name, "messages": long} for name in NAMES]
    (tmp_path / "long.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    settings = settings_of(stage=1, cache_states=True, plan=True, eval_data=[str(tmp_path / "long.jsonl")])
    train(settings)
    said = capsys.readouterr().err
    inputs = gather_inputs(settings)
    longest, tokens = [
        [rows.dataset[column][:] for rows in inputs.all_rows] for column in ("length", "num_response_tokens")
    ]
    assert max(longest[1]) > max(longest[0])
    assert f"activations of {4 * 3 * max(longest[1]):,} tokens" in said
    num_bytes = sum(map(sum, tokens)) * sum(inputs.info.hidden_sizes) * 4
    assert f"disk for cached hidden states: {num_bytes:.2f} GiB" in said


def test_the_plan_counts_the_parameters_that_then_learn(settings_of, tiny_path, run, capsys):
    path = run(stage=2, steps=1)
    said = capsys.readouterr().err
    trained = load_file(path.parent / RUN_FOLDER / "checkpoint-1" / "trained.safetensors")
    for index, name in enumerate(NAMES):
        own = sum(tensor.numel() for key, tensor in trained.items() if key.startswith(f"specialists.{index}."))
        assert f"parameters, {own:,} learn" in next(
            line for line in said.splitlines() if line.startswith(f"{name}: ") and "learn" in line
        )


def test_the_plan_of_a_draft_head_counts_what_its_training_holds(settings_of, capsys, monkeypatch):
    """It once was that of the gate: logits of the whole vocabulary, activations of the specialists."""
    monkeypatch.setattr("ultrafuser.gating.training.plan._GIB", 1)
    options = {"draft_vocabulary": 100, "draft_tokens": 2, "draft_window": 8, "chunk_size": 10}
    settings = settings_of(drafter=True, plan=True, **options)
    train(settings)
    said = dict(
        line.strip().rsplit(": ", 1)
        for line in capsys.readouterr().err.splitlines()
        if "GiB" in line and line[0] == " "
    )
    inputs = gather_inputs(settings)
    longest = max(inputs.rows.dataset["num_response_tokens"][:])
    gate = 64 * 512 + 512 + 512 + 1
    # 320 shared ids, three specialists of 64; a head of one pair of 64, four rows of a chunk's five positions.
    head = (3 * 64) * 64 + 128 * 64 * 3 + 64 * 64 + 64 * 128 + 64 * 64 + 4 * 64 + 100 * 64
    assert said["frozen weights"] == f"{4 * (3 * 64 * 100 + 320 * 64 + gate):.2f} GiB"
    assert said["trained weights, gradients and AdamW's moments"] == f"{16 * head:.2f} GiB"
    assert said["logits of a chunk of the loss"] == f"{4 * 100 * (3 * 10 + 4 * 5):.2f} GiB"
    assert said["attention of a window of 8 positions"] == f"{3 * 12 * 8 * min(16, longest) * 4:.2f} GiB"
    num_bytes = 12 * longest * (2 * 16 * 64 * 4 + 2 * 3 * 64 * 4)
    assert said[f"activations of {12 * longest:,} response tokens"] == f"{num_bytes:.2f} GiB"


def test_the_plan_counts_what_sharding_gathers_for_a_step(settings_of):
    settings = settings_of(stage=2)
    inputs = gather_inputs(settings)
    outside = [size.num_outside_layers for size in measure(inputs.fusion, settings)]
    assert outside == [2 * vocab_size * 64 + 64 for vocab_size in (320, 336, 328)], "embedding, output layer, norm"
