"""Training of a draft head: the same arithmetic as the engine's, a loss that counts what can be guessed, a run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from tests.draft_heads import config_for
from tests.fakes import build_gate, write_tiny_fusion
from tests.gating.examples import CONVERSATIONS
from ultrafuser.gating.data.batches import response_ids
from ultrafuser.gating.errors import TrainError
from ultrafuser.gating.model.draft_head import DraftHead, attend, load_draft_head
from ultrafuser.gating.model.fusion import inspect_fusion, load_fusion, save_fusion
from ultrafuser.gating.model.gate import Gate, fresh_gate
from ultrafuser.gating.model.gate_kind import CHANGES
from ultrafuser.gating.model.mixture import fuse
from ultrafuser.gating.model.reference import UltraFuserForCausalLM
from ultrafuser.gating.training import draft_learner
from ultrafuser.gating.training.building import build
from ultrafuser.gating.training.draft_learner import (
    DISCOUNT,
    DraftLearner,
    _marks,
    collate_responses,
    draft_vocabulary,
    fresh_draft_head,
)
from ultrafuser.gating.training.inputs import gather_inputs
from ultrafuser.gating.training.results import save_results

NUM_IDS, WINDOW, LENGTH = 320, 5, 12
EVEN_IDS = torch.arange(0, NUM_IDS, 2)


def make_learner(tiny_path: Path, gate: Gate) -> tuple[DraftLearner, list[Tensor]]:
    """A random head over random embeddings and output layers, which guesses even ids only; and these layers."""
    torch.manual_seed(1)
    head = DraftHead(config_for(tiny_path, num_draft_ids=NUM_IDS // 2, window=WINDOW))
    head.draft_ids_V.copy_(EVEN_IDS)
    whole = [torch.randn(NUM_IDS, 64) for _ in range(3)]
    output_weights = whole if gate.kind.probabilities else [own[EVEN_IDS] for own in whole]
    return DraftLearner(head, gate, torch.randn(NUM_IDS, 64), output_weights, num_guesses=3), whole


@pytest.fixture
def learner(tiny_path: Path) -> DraftLearner:
    """Of `make_learner`, beside a fresh gate of the paper's."""
    return make_learner(tiny_path, fresh_gate((64, 64, 64)))[0]


@pytest.fixture
def row() -> tuple[list[Tensor], Tensor]:
    """States and tokens of one response; some tokens cannot be guessed."""
    torch.manual_seed(2)
    return [torch.randn(LENGTH, 64) for _ in range(3)], torch.randint(0, NUM_IDS, (LENGTH,))


@torch.no_grad()
def weights_of(learner: DraftLearner, states: list[Tensor]) -> Tensor:
    """The gate's weights at the states of one response."""
    assert learner.fusion_gate is not None
    return learner.fusion_gate(states, torch.zeros(len(states[0])))


@torch.no_grad()
def guesses_one_by_one(learner: DraftLearner, row: tuple[list[Tensor], Tensor]) -> list[list[Tensor]]:
    """Scores [V] of the guesses from each position on, as the engine computes them: one query over kept keys."""
    states, tokens = row
    head = learner.draft_head
    features = head.features(states, weights_of(learner, states))
    scores = []
    for base in range(LENGTH):
        known = head.inputs(learner._embeddings(tokens[: base + 1]), features[: base + 1])
        keys, values = (list(own) for own in head.keys_values(known, torch.arange(base + 1)))
        feature, chain = features[base], []
        for position in range(base, min(base + 3, LENGTH)):
            inputs = head.inputs(learner._embeddings(tokens[position]), feature)
            if position > base:
                key, value = head.keys_values(inputs, torch.tensor(position))
                keys.append(key)
                values.append(value)
            is_seen = torch.arange(position + 1)[None] > position - WINDOW
            query = head.queries(inputs, torch.tensor(position))[None]
            feature = head.states(
                feature, attend(query, torch.stack(keys)[None], torch.stack(values)[None], is_seen)[0]
            )
            chain.append(head.scores(feature))
        scores.append(chain)
    return scores


@pytest.mark.parametrize("kind", ["paper", *CHANGES, "+".join(CHANGES)])
def test_the_loss_is_that_of_guesses_made_one_by_one(
    tiny_path: Path, row: tuple[list[Tensor], Tensor], kind: str
) -> None:
    gate = build_gate(kind, ("text", "code", "math"), (64, 64, 64))
    learner, whole = make_learner(tiny_path, gate)
    states, tokens = row
    output = learner(**collate_responses([row], -1, EVEN_IDS))
    weights_SR = weights_of(learner, states)
    with torch.no_grad():
        own_logits = [state @ own.T for state, own in zip(states, whole, strict=True)]
        logits = fuse(weights_SR, own_logits, NUM_IDS, gate.mixture)
    wanted, accepted = 0.0, [0] * LENGTH
    for base, chain in enumerate(guesses_one_by_one(learner, row)):
        is_right = True
        for ahead, scores in enumerate(chain):
            guessed = base + ahead + 1
            is_right &= guessed < LENGTH and int(scores.argmax()) * 2 == int(tokens[guessed])
            accepted[base] += is_right
            if guessed < LENGTH and tokens[guessed] % 2 == 0:
                target = logits[guessed][learner.draft_head.draft_ids_V].softmax(dim=-1)
                wanted -= DISCOUNT**ahead * float((target * scores.log_softmax(dim=-1)).sum())
    num_labels = sum(int(token) % 2 == 0 for token in tokens[1:])
    assert 0 < num_labels < LENGTH - 1, "some tokens are in the vocabulary, some outside"
    assert float(output["loss"].detach()) == pytest.approx(wanted / num_labels, rel=1e-5)
    assert len(output["tokens_N"]) == num_labels
    assert output["marks_XN"][0].tolist() == accepted
    assert output["marks_XN"][2, :-1].tolist() == [float(token % 2) for token in tokens[1:]]
    assert output["is_counted_XN"][1:].tolist() == [[True] * (LENGTH - 1) + [False]] * 2, "nothing follows the last"


def test_responses_of_which_nothing_can_be_guessed_teach_nothing(learner: DraftLearner) -> None:
    states = [torch.randn(4, 64) for _ in range(3)]
    for tokens in ([8, 3, 5, 7], [8]):
        batch = collate_responses([([own[: len(tokens)] for own in states], torch.tensor(tokens))], -1, EVEN_IDS)
        output = learner(**batch)
        output["loss"].backward()
        assert float(output["loss"].detach()) == 0
        assert len(output["tokens_N"]) == 0
        assert int(output["is_counted_XN"][0].sum()) == len(tokens) - 1, "a round gives one token"


def test_chunks_and_bands_change_memory_and_not_the_result(learner: DraftLearner, monkeypatch: Any) -> None:
    """Nothing is kept for the gradient that is as wide as the vocabulary or as what is attended to."""
    torch.manual_seed(3)
    length = 50
    row = [torch.randn(length, 64) for _ in range(3)], torch.randint(0, NUM_IDS, (length,))
    batch = collate_responses([row], -1, EVEN_IDS)
    num_scored: list[int] = []
    num_seen: list[int] = []
    score, attend_to = DraftHead.scores, draft_learner._attend_to

    def scores(self: DraftHead, states: Tensor) -> Tensor:
        num_scored.append(states[..., 0].numel())
        return score(self, states)

    def attended(queries: Tensor, keys: Tensor, values: Tensor, is_seen_TC: Tensor, *chain: Tensor) -> Tensor:
        num_seen.append(is_seen_TC.numel())
        return attend_to(queries, keys, values, is_seen_TC, *chain)

    monkeypatch.setattr(DraftHead, "scores", scores)
    monkeypatch.setattr(draft_learner, "_attend_to", attended)
    found = {}
    for chunk_size in (10_000, 7, 1):
        learner.chunk_size = chunk_size
        learner.zero_grad()
        num_scored.clear()
        widths: set[int] = set()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda own, widths=widths: widths.add(own.shape[-1]) or own,  # type: ignore[misc]
            lambda own: own,
        ):
            output = learner(**batch)
        output["loss"].backward()
        found[chunk_size] = output, {name: own.grad for name, own in learner.draft_head.named_parameters()}
        assert max(num_scored) <= max(chunk_size, 3), "three guesses of a position go together"
        assert not widths & {NUM_IDS // 2, WINDOW + 1, 2 * WINDOW}, "scores of the vocabulary; of keys and one's own"
    assert max(num_seen) <= WINDOW * 2 * WINDOW
    whole, wanted = found.pop(10_000)
    for output, gradients in found.values():
        torch.testing.assert_close(output["loss"], whole["loss"], rtol=1e-5, atol=0)
        assert torch.equal(output["marks_XN"], whole["marks_XN"])
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6, msg=name)


def test_accepted_guesses_count_by_the_rounds_that_the_engine_would_make() -> None:
    """A round stands behind all that the one before it gave: its right guesses and one token more."""
    tokens_BT = torch.tensor([[2, 4, 6, 8, 10, 12, 14], [2, 4, 6, -100, -100, -100, -100]])
    labels_BT = collate_responses([([], tokens_T[tokens_T >= 0]) for tokens_T in tokens_BT], -1, EVEN_IDS)["labels"]
    # By position, first guesses, then second ones, which their chains made a position before.
    is_right_LBT = torch.tensor(
        [
            [[1, 1, 0, 1, 0, 1, 0], [0, 1, 0, 0, 0, 0, 0]],
            [[0, 1, 1, 0, 1, 1, 0], [0, 1, 0, 0, 0, 0, 0]],
        ]
    ).bool()
    is_label_BT = labels_BT != -100
    marks, is_counted = _marks(tokens_BT, is_label_BT, is_right_LBT[:, is_label_BT])
    assert marks[0].tolist() == [[2, 2, 0, 2, 0, 1, 0], [0, 1, 0, 0, 0, 0, 0]]
    assert is_counted[0].nonzero().tolist() == [[0, 0], [0, 3], [1, 0], [1, 1]], "of the first at 0 and 3, not at 1"
    assert is_counted[1].sum(dim=1).tolist() == [6, 2]


def test_an_evaluation_is_a_mean_over_what_counts(run: Any, settings_of: Any) -> None:
    """Whatever the batches, of a response's tokens the first one is not guessed by any."""
    options = {"drafter": True, "draft_vocabulary": 20, "eval_data": [str(CONVERSATIONS)], "micro_rows_per_domain": 1}
    path = run(**options, steps=1)
    metrics = json.loads((path.parent / "manifest.json").read_text())["metrics"]
    head = load_draft_head(path.parent / "draft-head")
    inputs = gather_inputs(settings_of(**options))
    for domain, rows in inputs.eval_rows.items():
        followers = []
        for row in rows.dataset:
            tokens_R = torch.tensor(response_ids(row))
            after_end = torch.cat([torch.tensor([True]), tokens_R[:-1] == inputs.fusion.eos_token_ids[0]])
            followers.append(tokens_R[~after_end])
        outside = ~torch.isin(torch.cat(followers), head.draft_ids_V)
        assert metrics[f"eval_outside_{domain}"] == pytest.approx(float(outside.float().mean()))


@pytest.mark.parametrize("kind", ["paper", "smoothed"])
def test_responses_do_not_see_each_other_and_the_engine_would_not_either(
    tiny_path: Path, row: tuple[list[Tensor], Tensor], kind: str
) -> None:
    """Two turns of a row, and another row, are as three rows of one response each."""
    learner, _ = make_learner(tiny_path, build_gate(kind, ("text", "code", "math"), (64, 64, 64)))
    states, tokens = row
    tokens[4] = 2
    parts = [([own[begin:end] for own in states], tokens[begin:end]) for begin, end in ((0, 5), (5, LENGTH))]
    other = ([own.flip(0)[:3] for own in states], tokens.flip(0)[:3])
    together = learner(**collate_responses([row, other], 2, EVEN_IDS))
    alone = [learner(**collate_responses([own], 2, EVEN_IDS)) for own in (*parts, other)]
    torch.testing.assert_close(together["tokens_N"], torch.cat([own["tokens_N"] for own in alone]))
    torch.testing.assert_close(together["marks_XN"], torch.cat([own["marks_XN"] for own in alone], dim=1))
    torch.testing.assert_close(together["is_counted_XN"], torch.cat([own["is_counted_XN"] for own in alone], dim=1))
    shares = [len(own["tokens_N"]) / len(together["tokens_N"]) for own in alone]
    weighed = sum(float(own["loss"].detach()) * share for own, share in zip(alone, shares, strict=True))
    assert float(together["loss"].detach()) == pytest.approx(weighed, rel=1e-5)


def accepted_per_round(output: dict[str, Tensor]) -> float:
    return float(output["marks_XN"][0, output["is_counted_XN"][0]].mean())


def test_only_the_head_learns_and_it_learns_a_response_by_heart(tiny_path: Path) -> None:
    torch.manual_seed(4)
    config = config_for(tiny_path, num_draft_ids=100)
    output_weights = [torch.randn(100, 64) for _ in range(3)]
    head = fresh_draft_head(config, torch.arange(100), output_weights[0])
    learner = DraftLearner(head, fresh_gate((64, 64, 64)), torch.randn(NUM_IDS, 64), output_weights, num_guesses=3)
    assert all(name.startswith("draft_head.") for name, own in learner.named_parameters() if own.requires_grad)
    states = [torch.randn(30, 64) for _ in range(3)]
    weights_SR = learner.fusion_gate(states)  # type: ignore[misc]
    tokens = fuse(weights_SR, [state @ own.T for state, own in zip(states, output_weights, strict=True)], 100).argmax(
        -1
    )
    batch = collate_responses([(states, tokens)], -1, torch.arange(100))
    before = accepted_per_round(learner(**batch))
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    for _ in range(80):
        optimizer.zero_grad()
        learner(**batch)["loss"].backward()
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
    assert before < 0.5 < 2.5 < accepted_per_round(learner(**batch))


def test_the_draft_vocabulary_is_the_most_frequent_tokens() -> None:
    labels_N = torch.tensor([7, 7, 7, 3, 3, 9, 1, 1])
    assert draft_vocabulary(labels_N, 3, 20).tolist() == [1, 3, 7]
    assert draft_vocabulary(labels_N, 6, 20).tolist() == [0, 1, 2, 3, 7, 9], "of those never seen the first ones"
    assert draft_vocabulary(labels_N, 50, 20).tolist() == list(range(20))


def test_a_run_writes_a_fusion_that_drafts_with_its_head(run: Any, tiny_path: Path) -> None:
    path = run(drafter=True, draft_vocabulary=20, draft_tokens=3, draft_window=40, eval_data=[str(CONVERSATIONS)])
    fusion = load_fusion(path)
    assert inspect_fusion(fusion).num_shared_ids == NUM_IDS
    assert yaml.safe_load(path.read_text())["engine"]["speculation"] == {
        "drafter": "head",
        "path": "./draft-head",
        "max_tokens": 3,
    }
    assert fusion.gate == load_fusion(tiny_path).gate
    head = load_draft_head(path.parent / "draft-head")
    assert (head.config.window, head.config.num_draft_ids) == (40, 20)
    assert bool((head.mix.weight != 0).any()), "it has learnt"
    metrics = json.loads((path.parent / "manifest.json").read_text())["metrics"]
    assert {
        f"eval_{mark}_{domain}" for mark in ("accepted", "first", "outside") for domain in ("text", "code", "math")
    } < metrics.keys()
    assert 0 < metrics["eval_outside_text"] < 1


def test_a_head_learns_beside_the_gate_that_the_reference_has(tiny_copy: Path, settings_of: Any) -> None:
    content = yaml.safe_load(tiny_copy.read_text())
    tiny_copy.write_text(yaml.safe_dump({**content, "gate": "package:fresh"}))
    inputs = gather_inputs(settings_of(fusion=str(tiny_copy), drafter=True, seed=1))
    own = build(inputs, torch.device("cpu"), lambda label, share: None, {}).learner.fusion_gate
    reference = UltraFuserForCausalLM.from_fusion(load_fusion(tiny_copy)).fusion_gate
    assert own is not None
    assert reference is not None
    for name, tensor in reference.state_dict().items():
        assert torch.equal(own.state_dict()[name], tensor), name


def test_a_head_learns_beside_a_gate_of_every_change(run: Any, tmp_path: Path) -> None:
    start = write_tiny_fusion(tmp_path / "start", gate="+".join(CHANGES))
    path = run(fusion=str(start), drafter=True, draft_vocabulary=20, eval_data=[str(CONVERSATIONS)])
    assert load_draft_head(path.parent / "draft-head").config.num_draft_ids == 20
    history = json.loads((path.parent / "manifest.json").read_text())["history"]
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert losses[-1] < losses[0]


def test_a_head_of_one_specialist_is_refused_by_the_flag_that_asked_for_it(tiny_copy: Path, settings_of: Any) -> None:
    content = yaml.safe_load(tiny_copy.read_text())
    tiny_copy.write_text(yaml.safe_dump({**content, "specialists": content["specialists"][:1], "gate": None}))
    with pytest.raises(TrainError, match=r"^--drafter: tiny has one specialist; a draft head is trained for two"):
        gather_inputs(settings_of(fusion=str(tiny_copy), drafter=True))


@pytest.mark.parametrize(
    ("said", "written"),
    [
        (None, {"max_tokens": 3}),
        ({"drafter": "ngram"}, {"max_tokens": 3}),
        ({"drafter": "ngram", "max_tokens": 6, "min_tokens": 2}, {"max_tokens": 6, "min_tokens": 2}),
        ({"max_tokens": 4}, {}),  # the default, which need not be written
        ({"max_tokens": 0}, {"max_tokens": 3}),
        ({"min_tokens": 4}, {"max_tokens": 3, "min_tokens": 3}),
    ],
)
def test_the_engine_drafts_as_far_as_the_file_said_or_else_as_the_head_learnt(
    settings_of: Any, tiny_copy: Path, tmp_path: Path, learner: DraftLearner, said: Any, written: dict[str, int]
) -> None:
    content = yaml.safe_load(tiny_copy.read_text())
    content["engine"]["speculation"] = said
    tiny_copy.write_text(yaml.safe_dump(content))
    inputs = gather_inputs(settings_of(fusion=str(tiny_copy), drafter=True, draft_tokens=3))
    path = save_results(tmp_path / "out", inputs, learner, dict(learner.named_parameters()), {})
    found = yaml.safe_load(path.read_text())["engine"]["speculation"]
    assert found == {"drafter": "head", "path": "./draft-head", **written}
    assert load_fusion(path).engine.speculation is not None, "a file that can be read"


def test_a_fusion_that_learns_on_loses_its_head(run: Any, tmp_path: Path) -> None:
    path = run(drafter=True, draft_vocabulary=100, steps=1, output=str(tmp_path / "head"))
    learnt = run(fusion=str(path), stage=1, steps=1, output=str(tmp_path / "gate"))
    assert load_fusion(learnt).engine.speculation is None
    assert inspect_fusion(load_fusion(learnt)).num_shared_ids == NUM_IDS


@pytest.mark.parametrize(
    ("numbers", "kept"),
    [
        ({}, None),
        ({"max_tokens": 0}, {"max_tokens": 0}),
        ({"max_tokens": 6, "min_tokens": 2}, {"max_tokens": 6, "min_tokens": 2}),
        ({"min_tokens": 1}, {"min_tokens": 1}),
    ],
)
def test_a_fusion_without_its_head_guesses_as_far_as_its_file_says(
    with_head: Path, numbers: dict[str, int], kept: dict[str, int] | None
) -> None:
    content = yaml.safe_load(with_head.read_text())
    content["engine"]["speculation"] = {"drafter": "head", "path": "head", **numbers}
    with_head.write_text(yaml.safe_dump(content))
    save_fusion(load_fusion(with_head).without_draft_head(), with_head)
    assert yaml.safe_load(with_head.read_text())["engine"].get("speculation") == kept
