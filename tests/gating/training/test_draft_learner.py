"""Training of a draft head: the same arithmetic as the engine's, a loss that counts what can be guessed, a run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from tests.draft_heads import config_for
from tests.gating.examples import CONVERSATIONS
from ultrafuser.gating.model.draft_head import DraftHead, attend, load_draft_head
from ultrafuser.gating.model.fusion import inspect_fusion, load_fusion
from ultrafuser.gating.model.gate import fresh_gate, fuse
from ultrafuser.gating.training.draft_learner import (
    DISCOUNT,
    DraftLearner,
    collate_responses,
    draft_vocabulary,
    fresh_draft_head,
)

NUM_IDS, WINDOW, LENGTH = 320, 5, 12


@pytest.fixture
def learner(tiny_path: Path) -> DraftLearner:
    """A random head over random embeddings and output layers, which guesses even ids only."""
    torch.manual_seed(1)
    head = DraftHead(config_for(tiny_path, num_draft_ids=NUM_IDS // 2, window=WINDOW))
    head.draft_ids_V.copy_(torch.arange(0, NUM_IDS, 2))
    output_weights = [torch.randn(NUM_IDS // 2, 64) for _ in range(3)]
    return DraftLearner(head, fresh_gate((64, 64, 64)), torch.randn(NUM_IDS, 64), output_weights, num_guesses=3)


@pytest.fixture
def row() -> tuple[list[Tensor], Tensor]:
    """States and tokens of one response; some tokens cannot be guessed."""
    torch.manual_seed(2)
    return [torch.randn(LENGTH, 64) for _ in range(3)], torch.randint(0, NUM_IDS, (LENGTH,))


@torch.no_grad()
def guesses_one_by_one(learner: DraftLearner, row: tuple[list[Tensor], Tensor]) -> list[list[Tensor]]:
    """Scores [V] of the guesses from each position on, as the engine computes them: one query over kept keys."""
    states, tokens = row
    head = learner.draft_head
    features = head.features(states, learner.fusion_gate(states))  # type: ignore[misc]
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


def test_the_loss_is_that_of_guesses_made_one_by_one(learner: DraftLearner, row: tuple[list[Tensor], Tensor]) -> None:
    states, tokens = row
    output = learner(**collate_responses([row], eos_token_id=-1))
    with torch.no_grad():
        weights_SR = learner.fusion_gate(states)  # type: ignore[misc]
    wide = [
        torch.zeros(NUM_IDS, 64).index_copy(0, learner.draft_head.draft_ids_V, own) for own in learner._output_weights
    ]
    logits = fuse(weights_SR, [state @ own.T for state, own in zip(states, wide, strict=True)], NUM_IDS)
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
    assert float(output["loss"].detach()) == pytest.approx(wanted / LENGTH, rel=1e-5)
    assert output["marks_XN"][0].tolist() == accepted
    assert output["marks_XN"][2].tolist() == [*(float(token % 2) for token in tokens[1:]), 0.0]


def test_responses_do_not_see_each_other_and_the_engine_would_not_either(
    learner: DraftLearner, row: tuple[list[Tensor], Tensor]
) -> None:
    """Two turns of a row, and another row, are as three rows of one response each."""
    states, tokens = row
    tokens[4] = 2
    parts = [([own[begin:end] for own in states], tokens[begin:end]) for begin, end in ((0, 5), (5, LENGTH))]
    other = ([own.flip(0)[:3] for own in states], tokens.flip(0)[:3])
    together = learner(**collate_responses([row, other], eos_token_id=2))
    alone = [learner(**collate_responses([own], eos_token_id=2)) for own in (*parts, other)]
    torch.testing.assert_close(together["tokens_N"], torch.cat([own["tokens_N"] for own in alone]))
    torch.testing.assert_close(together["marks_XN"], torch.cat([own["marks_XN"] for own in alone], dim=1))
    shares = [len(own["tokens_N"]) / (LENGTH + 3) for own in alone]
    weighed = sum(float(own["loss"].detach()) * share for own, share in zip(alone, shares, strict=True))
    assert float(together["loss"].detach()) == pytest.approx(weighed, rel=1e-5)


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
    batch = collate_responses([(states, tokens)], eos_token_id=-1)
    before = float(learner(**batch)["marks_XN"][0].mean())
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    for _ in range(80):
        optimizer.zero_grad()
        learner(**batch)["loss"].backward()
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
    assert before < 0.5 < 2.5 < float(learner(**batch)["marks_XN"][0].mean())


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


def test_a_fusion_that_learns_on_loses_its_head(run: Any, tmp_path: Path) -> None:
    path = run(drafter=True, draft_vocabulary=100, steps=1, output=str(tmp_path / "head"))
    learnt = run(fusion=str(path), stage=1, steps=1, output=str(tmp_path / "gate"))
    assert load_fusion(learnt).engine.speculation is None
    assert inspect_fusion(load_fusion(learnt)).num_shared_ids == NUM_IDS
