"""Each specialist on ranks of its own: the same tokens, under everything that touches scheduling and sampling."""

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from vllm import RequestOutput, SamplingParams
from vllm.distributed import get_tp_group
from vllm.distributed.parallel_state import get_world_group
from vllm.sampling_params import StructuredOutputsParams

from tests.reference import read_text
from tests.server.engine.conftest import SPLIT
from tests.server.engine.harness import Arrival, InProcessEngine, engine_input, greedy, random_prompts
from tests.server.engine.judge import Judge
from ultrafuser.server.engine.shared.extra_args import GATE_WEIGHTS
from ultrafuser.server.engine.shared.step import NONFINITE_OUTPUT

Engines = Callable[[str], InProcessEngine]
MAX_TOKENS = 20
LENGTHS = [(13, 16, 36), (100, 20, 7), (1, 1, 60), (50, 50, 50), (5, 90, 33), (64, 1, 2), (40, 33, 31)]
"""Own prompt lengths per request: leader longest, shortest, all equal, and one token against many."""
BATCH = [random_prompts(lengths, seed) for seed, lengths in enumerate(LENGTHS)]
TOLERANCE = 2e-4
"""Of log probabilities: float32 programs that sum in different orders; logits here are of the order of ten."""


@pytest.fixture
def split(engine_of: Engines) -> InProcessEngine:
    """Three specialists on a rank each."""
    return engine_of("split")


def described(worker: Any) -> tuple[list[str], list[str], list[int], list[int]]:
    """What a rank holds, and the ranks that it takes for its tensor-parallel group and for the world."""
    runner = worker.model_runner
    folders = [own.model_config.model.rsplit("/", 1)[-1] for own in runner.runners]
    return runner.names, folders, get_tp_group().ranks, get_world_group().ranks


def test_a_rank_holds_one_shard_of_one_specialist_and_knows_no_others(engine_of: Engines) -> None:
    ranks = engine_of("split-hidden-tp").llm.collective_rpc(described)
    assert ranks == [
        ([name], [name], group, group)
        for name, group in zip(("text", "code", "math"), ([0, 1], [2, 3], [4, 5]), strict=True)
        for _ in range(2)
    ]


@pytest.mark.parametrize(
    ("configuration", "steps_apart"), [(name, 3) for name in SPLIT] + [("split", 0), ("split-async-pressure", 0)]
)
def test_a_batch_with_mixed_arrivals_equals_the_reference(
    engine_of: Engines, judge: Judge, configuration: str, steps_apart: int
) -> None:
    engine = engine_of(configuration)
    engine.reports.clear()
    params = greedy(MAX_TOKENS, extra_args={GATE_WEIGHTS: True})
    outputs = engine.generate([Arrival(prompts, params, step=i * steps_apart) for i, prompts in enumerate(BATCH)])
    for prompts, output in zip(BATCH, outputs, strict=True):
        expected = judge.generation(prompts, MAX_TOKENS)
        assert list(output.outputs[0].token_ids) == expected.token_ids
        np.testing.assert_allclose(output.outputs[0].gate_weights, expected.gate_weights.numpy(), atol=1e-4, rtol=0)
    assert sum(len(report.weights_TS) for report in engine.reports) == len(BATCH) * MAX_TOKENS, "one rank reports"


def test_preempted_requests_resume_exactly(engine_of: Engines, judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of("split-async-pressure")
    assert type(engine.scheduler).__name__ == "FusedAsyncScheduler"
    preempted: list[int] = []
    preempt = engine.scheduler._preempt_request

    def spy(request, *args, **kwargs):
        preempted.append(request.num_output_tokens)
        return preempt(request, *args, **kwargs)

    monkeypatch.setattr(engine.scheduler, "_preempt_request", spy)
    batch = [random_prompts(lengths, seed=90 + i) for i, lengths in enumerate([(60, 20, 40), (33, 70, 9)] * 3)]
    tokens = engine.tokens([Arrival(prompts, greedy(60)) for prompts in batch])
    assert any(preempted), "nothing was preempted after its first token"
    assert tokens == [judge.tokens(prompts, 60) for prompts in batch]


@pytest.mark.parametrize("configuration", ["split", "split-async-pressure"])
@pytest.mark.parametrize("idle", [0, 1, 2], ids=["leader", "follower-1", "follower-2"])
def test_a_specialist_with_nothing_to_compute_in_a_step(
    engine_of: Engines, judge: Judge, configuration: str, idle: int
) -> None:
    """Alone, so that all its ranks idle, and beside a request that decodes."""
    engine = engine_of(configuration)
    lengths = [70, 70, 70]
    lengths[idle] = 3
    short = random_prompts(lengths, seed=200 + idle)
    decoding = random_prompts((9, 9, 9), seed=210)
    assert engine.tokens([Arrival(short, greedy(8))]) == [judge.tokens(short, 8)]
    tokens = engine.tokens([Arrival(decoding, greedy(20)), Arrival(short, greedy(8), step=2)])
    assert tokens == [judge.tokens(decoding, 20), judge.tokens(short, 8)]


def test_an_earlier_response_is_found_in_the_cache(split: InProcessEngine, judge: Judge) -> None:
    first, glue = random_prompts((40, 33, 45), seed=9), random_prompts((9, 4, 11), seed=10)
    (response,) = split.tokens([Arrival(first, greedy(90))])
    follow_up = [prompt + response + own for prompt, own in zip(first, glue, strict=True)]
    (output,) = split.generate([Arrival(follow_up, greedy(8))])
    assert list(output.outputs[0].token_ids) == judge.tokens(follow_up, 8)
    assert output.num_cached_tokens == 96


def test_an_abort_leaves_the_others_untouched(split: InProcessEngine, judge: Judge) -> None:
    arrivals = [Arrival(prompts, greedy(MAX_TOKENS), step=i) for i, prompts in enumerate(BATCH)]
    for leaver, after in [(1, 2), (4, 1), (5, 9)]:
        arrivals[leaver].abort_after = after
    outputs = split.generate(arrivals)
    stayed = [0, 2, 3, 6]
    assert [list(outputs[i].outputs[0].token_ids) for i in stayed] == [
        judge.tokens(BATCH[i], MAX_TOKENS) for i in stayed
    ]
    split.tokens([Arrival(BATCH[3], greedy(2))])  # the finished ids travel with the next step
    split.llm.step()
    assert split.scheduler.get_request_counts() == (0, 0)
    assert (
        split.llm.collective_rpc(lambda worker: [view._requests for view in worker.model_runner._views]) == [[{}]] * 3
    )


def test_sampling_and_grammars_do_what_they_do_on_shared_ranks(engine_of: Engines) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    wishes: list[dict[str, Any]] = [
        {"temperature": 0.0, "structured_outputs": StructuredOutputsParams(json=schema), "max_tokens": 60},
        {"temperature": 1.0, "seed": 5, "ignore_eos": True, "max_tokens": 12},
        {"temperature": 0.7, "seed": 6, "top_p": 0.6, "repetition_penalty": 1.2, "ignore_eos": True, "max_tokens": 12},
        {"temperature": 1.0, "seed": 7, "n": 2, "ignore_eos": True, "max_tokens": 12},
    ]
    arrivals = [Arrival(BATCH[i], SamplingParams(**own), step=i) for i, own in enumerate(wishes)]
    found, expected = (engine_of(name).generate(arrivals) for name in ("split", "sync-budget-16"))
    assert tokens_of(found) == tokens_of(expected)
    assert isinstance(json.loads(found[0].outputs[0].text)["a"], int)


def tokens_of(outputs: list[RequestOutput]) -> list[list[list[int]]]:
    """By request and response."""
    return [[list(own.token_ids) for own in sorted(output.outputs, key=lambda o: o.index)] for output in outputs]


@pytest.mark.parametrize("configuration", ["split", "split-hidden-tp"])
def test_prompts_are_scored_as_the_reference_does(engine_of: Engines, judge: Judge, configuration: str) -> None:
    """Two of them in turn, in chunks, beside a request that decodes, while the client of a third one leaves."""
    texts = [random_prompts([length], seed=30 + length)[0] for length in (50, 33, 70)]
    arrivals = [Arrival(BATCH[0], greedy(8))]
    arrivals += [Arrival([text] * 3, greedy(2, prompt_logprobs=0), step=i) for i, text in enumerate(texts)]
    arrivals[3].abort_after = 3
    decoded, *scored, _ = engine_of(configuration).generate(arrivals)
    assert list(decoded.outputs[0].token_ids) == judge.tokens(BATCH[0], 8)
    for text, output in zip(texts, scored, strict=False):
        assert output.prompt_logprobs is not None
        entries = zip(output.prompt_logprobs[1:], text[1:], strict=True)
        found = [own[token].logprob for own, token in entries if own is not None]
        wanted = read_text(judge.model, text)[range(len(text) - 1), text[1:]]
        assert found == pytest.approx(wanted.tolist(), abs=TOLERANCE)


def test_hidden_states_give_what_logits_give(engine_of: Engines) -> None:
    arrivals = [Arrival(prompts, greedy(8, logprobs=5), step=i) for i, prompts in enumerate(BATCH)]
    found, expected = (engine_of(name).generate(arrivals) for name in ("split-hidden-tp", "split"))
    assert tokens_of(found) == tokens_of(expected)
    for own, other in zip(found, expected, strict=True):
        for entries, others in zip(own.outputs[0].logprobs, other.outputs[0].logprobs, strict=True):
            assert entries.keys() == others.keys()
            for token, entry in entries.items():
                assert entry.logprob == pytest.approx(others[token].logprob, abs=TOLERANCE)


def noted_outputs(worker: Any) -> list[int]:
    """What a rank's specialist has noted as generated, of the only request."""
    (state,) = worker.model_runner.runners[0].requests.values()
    return list(state.output_token_ids)


@pytest.mark.parametrize("configuration", ["split", pytest.param("split-hidden-tp", marks=pytest.mark.long)])
def test_ranks_do_not_drift_over_500_unseeded_draws(engine_of: Engines, configuration: str) -> None:
    engine = engine_of(configuration)
    params = SamplingParams(temperature=1.0, ignore_eos=True, max_tokens=500)
    engine.llm.add_request("drift", engine_input(BATCH[0]), params)
    seen: list[int] = []
    while len(seen) < 490:  # and before the last step, after which all is forgotten
        for output in engine.llm.step():
            seen = list(output.outputs[0].token_ids)
    noted = engine.llm.collective_rpc(noted_outputs)
    assert noted == [seen] * len(noted)
    assert len(set(seen)) > 20
    while engine.llm.has_unfinished_requests():
        engine.llm.step()


def set_norm(worker: Any, rank: int, value: float) -> float:
    """Change one weight of the last norm of a rank's specialist; what it was."""
    weight = worker.model_runner.runners[0].model.model.norm.weight.data
    before = float(weight[5])
    if worker.rank == rank:
        weight[5] = value
    return before


def test_values_of_a_follower_that_are_not_finite_end_the_request(split: InProcessEngine, judge: Judge) -> None:
    split.reports.clear()
    before = split.llm.collective_rpc(set_norm, args=(2, math.nan))[2]
    (output,) = split.generate([Arrival(BATCH[0], greedy(4))])
    split.llm.collective_rpc(set_norm, args=(2, before))
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("error", NONFINITE_OUTPUT)
    assert [name for report in split.reports for name in report.nonfinite] == ["math"]
    assert split.tokens([Arrival(BATCH[0], greedy(4))]) == [judge.tokens(BATCH[0], 4)]


@pytest.mark.parametrize("configuration", ["split", "split-async-pressure"])
def test_a_step_tells_every_specialists_times(engine_of: Engines, configuration: str) -> None:
    engine = engine_of(configuration)
    engine.tokens([Arrival(BATCH[0], greedy(2))])  # followers tell of what they did before with the next token
    engine.reports.clear()
    engine.tokens([Arrival(random_prompts((40, 40, 40), seed=80), greedy(30))])
    parts = [(span.part, span.specialist) for report in engine.reports for span in report.spans]
    for name in ("text", "code", "math"):
        assert parts.count(("decode", name)) == pytest.approx(29, abs=1)
        assert parts.count(("prefill", name)) == 3
        assert parts.count(("idle", name)) == pytest.approx(30, abs=1)
    assert parts.count(("exchange", None)) == parts.count(("gate", None)) == parts.count(("mix", None)) == 30
    assert all(0 < span.seconds < 5 for report in engine.reports for span in report.spans)
