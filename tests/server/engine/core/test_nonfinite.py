"""A request for which a specialist or the gate yields NaN or infinity ends with an error; nothing else changes."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from vllm.logprobs import Logprob

from tests.server.engine.conftest import CONFIGURATIONS
from tests.server.engine.harness import Arrival, InProcessEngine, Prompts, greedy, random_prompts
from tests.server.engine.judge import Judge
from ultrafuser.server.engine.client.nonfinite import NonfiniteOutputError, raise_if_nan
from ultrafuser.server.engine.shared.extra_args import FORCED_TOKEN_IDS, GATE_WEIGHTS
from ultrafuser.server.engine.shared.step import NONFINITE_OUTPUT

POISON = 259
"""A token that no prompt of these tests has and the tiny models do not choose."""
LENGTHS = [(13, 16, 36), (60, 20, 7), (1, 1, 60), (50, 50, 50)]
BATCH = [random_prompts(lengths, seed) for seed, lengths in enumerate(LENGTHS)]
MAX_TOKENS = 16

Engines = Callable[[str], InProcessEngine]


@contextmanager
def poisoned(engine: InProcessEngine, specialist: int) -> Iterator[None]:
    """Let one specialist compute NaN from one token on, in every layer."""
    embedding = engine.runner.runners[specialist].model.model.embed_tokens.weight.data
    healthy = embedding[POISON].clone()
    embedding[POISON] = math.nan
    yield
    embedding[POISON] = healthy


def with_poison(prompts: Prompts, specialist: int) -> Prompts:
    """The prompts with the poison in the middle of one of them."""
    changed = [list(prompt) for prompt in prompts]
    changed[specialist][len(changed[specialist]) // 2] = POISON
    return changed


def healthy_arrivals() -> list[Arrival]:
    return [Arrival(prompts, greedy(MAX_TOKENS), step=index) for index, prompts in enumerate(BATCH)]


def assert_exact(outputs: list[Any], judge: Judge) -> None:
    for prompts, output in zip(BATCH, outputs, strict=True):
        assert list(output.outputs[0].token_ids) == judge.tokens(prompts, MAX_TOKENS)


def blamed(engine: InProcessEngine) -> list[str]:
    """Whose values ended requests, since last asked."""
    names = [name for report in engine.reports for name in report.nonfinite]
    engine.reports.clear()
    return names


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_nan_in_a_prompt_ends_that_request_and_no_other(engine_of: Engines, judge: Judge, configuration: str) -> None:
    engine = engine_of(configuration)
    blamed(engine)
    sick = [Arrival(with_poison(random_prompts((40, 90, 70), seed), 1), greedy(8), step=seed - 30) for seed in (30, 32)]
    with poisoned(engine, 1):
        *outputs, first, second = engine.generate([*healthy_arrivals(), *sick])
    for output in (first, second):
        assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("error", NONFINITE_OUTPUT)
        assert list(output.outputs[0].token_ids) == []
    assert_exact(outputs, judge)
    assert blamed(engine) == ["code", "code"]
    # The blocks with NaN in them serve others now.
    assert_exact(engine.generate(healthy_arrivals()), judge)
    assert not engine.scheduler.requests
    assert blamed(engine) == []


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize("steps", range(1, 8))
def test_a_client_that_leaves_before_the_nan_is_found_leaves_none_behind(
    engine_of: Engines, judge: Judge, configuration: str, steps: int
) -> None:
    """In a prompt that is not read to its end, and in the step that computes it."""
    engine = engine_of(configuration)
    extra = {FORCED_TOKEN_IDS: [5, 6, POISON, 8, 9, 10]}
    leaving = [
        Arrival(with_poison(random_prompts((90, 120, 70), seed=50), 1), greedy(8), abort_after=steps),
        Arrival(random_prompts((12, 9, 31), seed=51), greedy(6, extra_args=extra), abort_after=steps),
    ]
    with poisoned(engine, 1):
        engine.generate(leaving)
    blamed(engine)
    assert_exact(engine.generate(healthy_arrivals()), judge)
    assert blamed(engine) == []


@pytest.mark.parametrize("configuration", ["sync", "async", "async-pressure-budget-16"])
def test_tokens_before_the_nan_are_handed_out(engine_of: Engines, configuration: str) -> None:
    engine = engine_of(configuration)
    blamed(engine)
    given = [5, 6, 7, POISON, 8, 9, 10]
    with poisoned(engine, 2):
        params = greedy(len(given), extra_args={FORCED_TOKEN_IDS: given, GATE_WEIGHTS: True})
        (output,) = engine.generate([Arrival(BATCH[0], params)])
    assert output.outputs[0].finish_reason == "error"
    assert list(output.outputs[0].token_ids) == given[:4]
    assert output.outputs[0].gate_weights.shape == (4, 3)
    assert sum(len(report.weights_TS) for report in engine.reports) == 4
    assert blamed(engine) == ["math"]


@pytest.mark.parametrize("configuration", ["sync", "async", "sync-budget-16", "async-budget-16"])
def test_no_neighbour_changes_by_one_bit(engine_of: Engines, configuration: str) -> None:
    """Beside a request that goes wrong, and beside its twin that ends by a stop token in the same step."""
    engine = engine_of(configuration)
    seen = []
    for token in (POISON, 11):
        assert engine.llm.reset_prefix_cache()
        extra = {FORCED_TOKEN_IDS: [5, 6, 7, token, 8, 9, 10]}
        ending = Arrival(random_prompts((20, 30, 25), seed=40), greedy(7, extra_args=extra, stop_token_ids=[8]))
        params = greedy(MAX_TOKENS, logprobs=5, extra_args={GATE_WEIGHTS: True})
        neighbours = [Arrival(prompts, params) for prompts in BATCH]
        with poisoned(engine, 0):
            sick, *outputs = engine.generate([ending, *neighbours])
        assert sick.outputs[0].finish_reason == ("error" if token == POISON else "stop")
        completions = [output.outputs[0] for output in outputs]
        logprobs = [[{i: lp.logprob for i, lp in step.items()} for step in own.logprobs] for own in completions]
        seen.append((logprobs, [own.gate_weights.tolist() for own in completions]))
    assert seen[0] == seen[1]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("configuration", ["sync", "async"])
def test_one_bad_logit_of_one_specialist_is_enough(
    engine_of: Engines, judge: Judge, monkeypatch: pytest.MonkeyPatch, configuration: str, value: float
) -> None:
    engine = engine_of(configuration)
    blamed(engine)
    runner = engine.runner.runners[2]
    execute = runner.execute_model
    calls: list[None] = []

    def execute_model(*args: Any) -> Any:
        result = execute(*args)
        calls.append(None)
        if len(calls) == 6:
            (row,) = [row for id, row in runner.input_batch.req_id_to_index.items() if id.startswith(f"{sick_id}-")]
            runner.execute_model_state.logits[row, 100] = value
        return result

    (sick_id,) = engine.next_ids(1)
    monkeypatch.setattr(runner, "execute_model", execute_model)
    sick, *outputs = engine.generate([Arrival(random_prompts((9, 8, 7), 41), greedy(20)), *healthy_arrivals()])
    assert sick.outputs[0].finish_reason == "error"
    assert len(sick.outputs[0].token_ids) == 5
    assert_exact(outputs, judge)
    assert blamed(engine) == ["math"]


@pytest.mark.parametrize("configuration", ["sync", "async"])
def test_a_gate_that_yields_nan_is_blamed_itself(
    engine_of: Engines, judge: Judge, monkeypatch: pytest.MonkeyPatch, configuration: str
) -> None:
    engine = engine_of(configuration)
    blamed(engine)
    parts = engine.runner._mixer._parts
    assert parts is not None
    gate: Any = parts.gate
    weights_of = gate.weights_of
    calls: list[None] = []

    def broken(parts_SBP: torch.Tensor) -> torch.Tensor:
        weights_SB: torch.Tensor = weights_of(parts_SBP)
        calls.append(None)
        if len(calls) == 4:
            weights_SB[1, 0] = math.nan
        return weights_SB

    monkeypatch.setattr(gate, "weights_of", broken)
    sick, *outputs = engine.generate([Arrival(random_prompts((9, 8, 7), 42), greedy(20)), *healthy_arrivals()])
    assert (sick.outputs[0].finish_reason, len(sick.outputs[0].token_ids)) == ("error", 3)
    assert_exact(outputs, judge)
    assert blamed(engine) == ["gate"]


@pytest.mark.parametrize("configuration", ["sync", "async-budget-16"])
def test_blocks_of_a_request_that_went_wrong_are_not_found_again(
    engine_of: Engines, judge: Judge, configuration: str
) -> None:
    engine = engine_of(configuration)
    assert engine.llm.reset_prefix_cache()
    prompts = with_poison(random_prompts((130, 120, 125), seed=43), 1)
    with poisoned(engine, 1):
        (sick,) = engine.generate([Arrival(prompts, greedy(6))])
    assert sick.outputs[0].finish_reason == "error"
    (healed,) = engine.generate([Arrival(prompts, greedy(6))])
    assert healed.num_cached_tokens == 0
    assert list(healed.outputs[0].token_ids) == judge.tokens(prompts, 6)


def test_a_prompt_with_a_log_probability_that_is_nan_ends_with_an_error() -> None:
    raise_if_nan([None, {5: Logprob(-1.0)}, {6: Logprob(-math.inf)}])
    with pytest.raises(NonfiniteOutputError):
        raise_if_nan([None, {5: Logprob(-1.0), 7: Logprob(math.nan)}])
