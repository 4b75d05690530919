"""Every kind of gate gives the reference's tokens, weights and log probabilities, under everything that touches them.

A smoothed gate looks back at each response's earlier states, which the workers keep: over chunks, drafts that do not
hold, preemption and steps that are under way, on each rank, and for this response alone.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vllm import RequestOutput, SamplingParams

from tests.draft_heads import write_random_head
from tests.fakes import write_tiny_fusion
from tests.reference import read
from tests.server.engine.conftest import BUDGET_16, DRAFTS, PRESSURE
from tests.server.engine.harness import Arrival, InProcessEngine, greedy, random_prompts
from tests.server.engine.judge import Judge
from ultrafuser.gating.model.fusion import load_fusion
from ultrafuser.gating.model.gate_kind import CHANGES, PAPER
from ultrafuser.gating.model.reference import UltraFuserForCausalLM
from ultrafuser.server.engine.shared.extra_args import FORCED_TOKEN_IDS, GATE_WEIGHTS

NUM_TOKENS = 40
SEEDS = {(60, 20, 40): 4, (33, 70, 9): 6, (5, 90, 33): 2, (50, 50, 50): 6, (64, 1, 2): 3, (13, 16, 36): 7}
"""By own prompt lengths: the reference of every kind is decided at each token."""
BATCH = [random_prompts(lengths, seed) for lengths, seed in SEEDS.items()]
GLUE = random_prompts((7, 3, 12), seed=301)
TOLERANCE = 2e-4
"""Of log probabilities: float32 programs that sum in different orders."""

ALL = "+".join(CHANGES)
KINDS = [PAPER, *CHANGES, ALL]
TP: dict[str, Any] = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
NGRAM: dict[str, Any] = {"speculation": {"drafter": "ngram", "min_tokens": 3, "max_tokens": 3}}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "async-pressure": {"force_async": True, **PRESSURE, **BUDGET_16},
    "drafts-pressure": {**DRAFTS, **PRESSURE},
    "ngram-pressure": {**NGRAM, **PRESSURE},
    "head": BUDGET_16,
    "tp-drafts": {**TP, **DRAFTS, **BUDGET_16},
    "split-async-pressure": {"placement": "split", "force_async": True, **PRESSURE, **BUDGET_16},
    "split-drafts-pressure": {"placement": "split", "exchange": "hidden", **DRAFTS, **PRESSURE, "max_num_seqs": 8},
    "split-hidden-tp": {"placement": "split", "exchange": "hidden", "tensor_parallel_size": 2, **BUDGET_16},
}
OFTEN = {
    ALL: ["async-pressure", "drafts-pressure", "tp-drafts", "split-async-pressure", "split-drafts-pressure"],
    "smoothed": ["async-pressure", "drafts-pressure"],
}
PLACES = [
    pytest.param(kind, name, marks=[] if name in OFTEN.get(kind, ()) else pytest.mark.long)
    for kind in KINDS
    for name in CONFIGURATIONS
]

Engines = Callable[[str, str], InProcessEngine]
Judges = Callable[[str], Judge]


@pytest.fixture(scope="module")
def path_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny fusion with a random gate of a kind."""
    folder, paths = tmp_path_factory.mktemp("kinds"), dict[str, Path]()

    def get(kind: str) -> Path:
        if kind not in paths:
            paths[kind] = write_tiny_fusion(folder / kind, gate=kind)
        return paths[kind]

    return get


@pytest.fixture(scope="module")
def judge_of(path_of: Callable[[str], Path]) -> Judges:
    """Its Transformers reference."""
    judges: dict[str, Judge] = {}

    def get(kind: str) -> Judge:
        if kind not in judges:
            judges[kind] = Judge(UltraFuserForCausalLM.from_fusion(load_fusion(path_of(kind))))
        return judges[kind]

    return get


@pytest.fixture(scope="module")
def engine_of_kind(path_of: Callable[[str], Path], shared_groups: None) -> Iterator[Engines]:
    """Its engine in a configuration of the table above; one at a time but for those that several tests ask for."""
    running: dict[tuple[str, str], InProcessEngine] = {}

    def get(kind: str, name: str) -> InProcessEngine:
        if (kind, name) not in running:
            own = shared if name == "drafts-pressure" else alone
            alone.close()
            for place in [place for place in running if place[1] != "drafts-pressure"]:
                del running[place]
            options = CONFIGURATIONS[name]
            if name == "head":
                folder = path_of(kind).parent / "head"
                head = folder if folder.exists() else write_random_head(path_of(kind), folder)
                speculation = {"drafter": "head", "path": str(head), "min_tokens": 4, "max_tokens": 4}
                options = {**options, "speculation": speculation}
            running[kind, name] = own.enter_context(InProcessEngine(path_of(kind), **options))
        return running[kind, name]

    with ExitStack() as shared, ExitStack() as alone:
        yield get


def assert_equal(output: RequestOutput, wanted: Any) -> None:
    """Tokens, weights and log probabilities."""
    (completion,) = output.outputs
    assert list(completion.token_ids) == list(wanted.token_ids)
    np.testing.assert_allclose(completion.gate_weights, wanted.gate_weights.numpy(), atol=1e-4, rtol=0)
    if completion.logprobs is not None:
        pairs = zip(completion.logprobs, completion.token_ids, strict=True)
        found = [entries[token].logprob for entries, token in pairs]
        expected = wanted.logprobs[range(len(found)), list(wanted.token_ids)]
        assert found == pytest.approx(expected.tolist(), abs=TOLERANCE)


def num_remembered(worker: Any) -> int:
    """Of how many requests a rank keeps anything."""
    memories = worker.model_runner._mixer._parts._memories
    return 0 if memories is None else len(memories._kept)


@pytest.mark.parametrize(("kind", "name"), PLACES)
def test_tokens_weights_and_logprobs_are_the_references(
    engine_of_kind: Engines, judge_of: Judges, monkeypatch: pytest.MonkeyPatch, kind: str, name: str
) -> None:
    engine, judge = engine_of_kind(kind, name), judge_of(kind)
    preempted: list[int] = []
    preempt = engine.scheduler._preempt_request

    def spy(request, *args, **kwargs):
        preempted.append(request.num_output_tokens)
        return preempt(request, *args, **kwargs)

    monkeypatch.setattr(engine.scheduler, "_preempt_request", spy)
    for logprobs, apart in ((0, 2), (None, 0)):  # drafts are verified in two ways
        engine.reports.clear()
        params = greedy(NUM_TOKENS, logprobs=logprobs, extra_args={GATE_WEIGHTS: True})
        outputs = engine.generate([Arrival(prompts, params, step=apart * i) for i, prompts in enumerate(BATCH)])
        for prompts, output in zip(BATCH, outputs, strict=True):
            assert_equal(output, judge.generation(prompts, NUM_TOKENS))
        rounds = [own for report in engine.reports for own in report.rounds]
        num_drafts, num_held = (sum(getattr(own, key) for own in rounds) for key in ("num_drafts", "num_accepted"))
        assert num_drafts > num_held > 10 or "drafts" not in name, "some hold, some do not"
        assert num_drafts > 0 or name not in ("ngram-pressure", "head")
    assert any(preempted) == ("pressure" in name), "some after their first token"
    assert_a_follow_up_is_a_response_of_its_own(engine, judge)
    engine.llm.step()  # the finished ids travel with the next step
    assert not any(engine.llm.collective_rpc(num_remembered))


def assert_a_follow_up_is_a_response_of_its_own(engine: InProcessEngine, judge: Judge) -> None:
    """Though its prompt has an earlier response, which is found in the cache."""
    (output,) = engine.generate([Arrival(BATCH[0], greedy(NUM_TOKENS))])
    response = list(output.outputs[0].token_ids)
    follow_up = [prompt + response + own for prompt, own in zip(BATCH[0], GLUE, strict=True)]
    (output,) = engine.generate([Arrival(follow_up, greedy(8, extra_args={GATE_WEIGHTS: True}))])
    assert_equal(output, judge.generation(follow_up, 8))
    assert output.num_cached_tokens >= 32


@pytest.mark.parametrize("kind", ["smoothed", ALL])
def test_a_given_response_is_read_with_what_came_before_it(
    engine_of_kind: Engines, judge_of: Judges, kind: str
) -> None:
    engine = engine_of_kind(kind, "drafts-pressure")
    (given,) = random_prompts([30], seed=9)
    params = greedy(30, logprobs=0, extra_args={FORCED_TOKEN_IDS: given, GATE_WEIGHTS: True})
    output, _ = engine.generate([Arrival(BATCH[1], params), Arrival(BATCH[2], greedy(NUM_TOKENS))])
    logprobs_TV, weights_TS = read(judge_of(kind).model, BATCH[1], given)
    assert list(output.outputs[0].token_ids) == given
    np.testing.assert_allclose(output.outputs[0].gate_weights, weights_TS.numpy(), atol=1e-4, rtol=0)
    found = [entries[token].logprob for entries, token in zip(output.outputs[0].logprobs, given, strict=True)]
    assert found == pytest.approx(logprobs_TV[range(30), given].tolist(), abs=TOLERANCE)


@pytest.mark.parametrize("kind", ["smoothed", ALL])
def test_several_responses_to_one_prompt_do_not_know_of_each_other(
    engine_of_kind: Engines, judge_of: Judges, kind: str
) -> None:
    engine = engine_of_kind(kind, "drafts-pressure")
    options: dict[str, Any] = {"ignore_eos": True, "max_tokens": NUM_TOKENS, "extra_args": {GATE_WEIGHTS: True}}
    params = SamplingParams(temperature=1.0, seed=1, n=3, **options)
    (output,) = engine.generate([Arrival(BATCH[3], params)])
    assert len({tuple(own.token_ids) for own in output.outputs}) == 3
    for own in output.outputs:
        _, weights_TS = read(judge_of(kind).model, BATCH[3], list(own.token_ids))
        np.testing.assert_allclose(own.gate_weights, weights_TS.numpy(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["smoothed", ALL])
@pytest.mark.parametrize("name", ["drafts-pressure", pytest.param("split-drafts-pressure", marks=pytest.mark.long)])
def test_each_position_of_a_prompt_is_the_first_of_a_response(
    engine_of_kind: Engines, judge_of: Judges, kind: str, name: str
) -> None:
    """Read in chunks, or found in the cache, a prompt has nothing before it."""
    (text,) = random_prompts([40], seed=80)
    engine, model = engine_of_kind(kind, name), judge_of(kind).model
    (output,) = engine.generate([Arrival([text] * 3, greedy(9, prompt_logprobs=0))])
    assert output.prompt_logprobs is not None
    found = [own[token].logprob for own, token in zip(output.prompt_logprobs[1:], text[1:], strict=True) if own]
    wanted = [float(read(model, [text[:end]] * 3, text[end : end + 1])[0][0, text[end]]) for end in range(1, 40)]
    assert found == pytest.approx(wanted, abs=TOLERANCE)
