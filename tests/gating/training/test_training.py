"""Training end to end on tiny models: what learns, what must not, and what comes out."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.gating.examples import CONVERSATIONS
from tests.gating.training.runs import loss_of, losses_in, weights_of
from ultrafuser.gating.commands.run_folder import RUN_FOLDER
from ultrafuser.gating.data.batches import collate_rows
from ultrafuser.gating.model.fusion import load_fusion
from ultrafuser.gating.model.gate_file import load_gate
from ultrafuser.gating.model.reference import UltraFuserForCausalLM
from ultrafuser.gating.training.command import train
from ultrafuser.gating.training.inputs import gather_inputs
from ultrafuser.gating.training.trainer import FusedTrainer

NAMES = ("text", "code", "math")


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
    from ultrafuser.gating.training import learner

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
    monkeypatch.setattr(
        "ultrafuser.gating.model.loading.load_frozen", lambda *_: pytest.fail("a specialist was loaded")
    )
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


@pytest.mark.parametrize("learn", ["full", "lora"])
def test_a_specialist_with_a_tied_output_layer_is_trained_and_saved_tied(tiny_copy, run, learn):
    config = LlamaConfig.from_pretrained(tiny_copy.parent / "code", tie_word_embeddings=True)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tiny_copy.parent / "code")
    path = run(fusion=str(tiny_copy), stage=2, learn=learn, learning_rate=1e-3, steps=4)
    last = load_file(path.parent / RUN_FOLDER / "checkpoint-4" / "trained.safetensors")
    after = weights_of(path)
    embedding, output_layer = "specialists.1.model.embed_tokens.weight", "specialists.1.lm_head.weight"
    assert torch.equal(after[embedding], after[output_layer])
    if learn == "full":
        assert output_layer not in last
        assert torch.equal(after[embedding], last[embedding])


def test_gradient_checkpointing_changes_memory_and_not_the_result(run, tmp_path):
    losses = [
        losses_in(run(stage=2, gradient_checkpointing=flag, output=str(tmp_path / str(flag))).parent)
        for flag in (False, True)
    ]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=0)


@pytest.mark.parametrize("options", [{"stage": 1}, {"drafter": True, "draft_vocabulary": 20}], ids=["gate", "head"])
def test_micro_batches_add_up_to_the_whole_batch(run, tmp_path, options):
    """The step's tokens, not each micro-batch's, divide the sum: responses of unequal length count as in one batch."""
    losses = [
        losses_in(run(**options, micro_rows_per_domain=size, output=str(tmp_path / str(size))).parent)
        for size in (4, 1)
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
