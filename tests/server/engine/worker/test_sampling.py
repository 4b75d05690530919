"""Sampling, penalties, masks and logprobs act on the fused logits."""

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from tests.fakes import EOS_ID
from tests.server.engine.harness import Arrival, InProcessEngine, greedy, random_prompts
from tests.server.engine.judge import Judge

Engines = Callable[[str], InProcessEngine]
PROMPTS = random_prompts((13, 16, 36), seed=0)
LONG = random_prompts((50, 90, 20), seed=7)
UNDECIDED = random_prompts((13, 16, 36), seed=6)
"""Its first token has an entropy of 3 nats; the others' are nearly certain."""
CHUNKED = ["sync-budget-16", "async-budget-16"]


def sampled(max_tokens: int, **kwargs: object) -> SamplingParams:
    return SamplingParams(temperature=1.0, ignore_eos=True, max_tokens=max_tokens, **kwargs)


@pytest.mark.parametrize("configuration", ["sync", "async"])
def test_n_2_with_a_seed_equals_two_requests_with_consecutive_seeds(engine_of: Engines, configuration: str) -> None:
    engine = engine_of(configuration)
    (both,) = engine.generate([Arrival(PROMPTS, sampled(12, n=2, seed=41))])
    alone = engine.tokens([Arrival(PROMPTS, sampled(12, seed=41)), Arrival(PROMPTS, sampled(12, seed=42), step=5)])
    assert [list(output.token_ids) for output in sorted(both.outputs, key=lambda o: o.index)] == alone
    assert alone[0] != alone[1]


@pytest.mark.parametrize("configuration", CHUNKED)
def test_a_seed_with_chunked_prefill_equals_the_unchunked_run(engine_of: Engines, configuration: str) -> None:
    """A row that ends in no token must draw nothing; on the CPU plain vLLM's engine dies of it."""
    arrivals = [Arrival(prompts, sampled(10, seed=i), step=i) for i, prompts in enumerate([PROMPTS, LONG, LONG])]
    assert engine_of(configuration).tokens(arrivals) == engine_of("sync").tokens(arrivals)


def test_sampling_follows_the_fused_distribution(engine: InProcessEngine, judge: Judge) -> None:
    num_draws = 2048
    (output,) = engine.generate([Arrival(UNDECIDED, sampled(1, n=num_draws, seed=1000, logprobs=0))])
    drawn = np.bincount([choice.token_ids[0] for choice in output.outputs], minlength=320)

    def p_value(logprobs: np.ndarray) -> float:
        expected = np.exp(logprobs.astype(np.float64))
        expected *= num_draws / expected.sum()
        rare = expected < 5
        groups = np.append(expected[~rare], expected[rare].sum())
        counts = np.append(drawn[~rare], drawn[rare].sum())
        return float(chisquare(counts, groups).pvalue)

    generation = judge.generation(UNDECIDED, 1)
    assert p_value(generation.logprobs[0].numpy()) > 1e-3
    leader_alone = judge.model.specialists[0](torch.tensor([UNDECIDED[0]])).logits[0, -1].log_softmax(-1)
    assert p_value(leader_alone.detach().numpy()) < 1e-6, "the test could not tell the fused model from its leader"


LOGPROB_TOLERANCE = 2e-4
"""Two float32 programs that sum in different orders; logits here are of the order of ten."""


@pytest.mark.parametrize("configuration", ["sync", "async", *CHUNKED])
def test_logprobs_equal_the_references(engine_of: Engines, judge: Judge, configuration: str) -> None:
    (output,) = engine_of(configuration).generate([Arrival(LONG, greedy(8, logprobs=5))])
    reference = judge.generation(LONG, 8).logprobs
    assert len(output.outputs[0].logprobs) == 8
    for position, entries in enumerate(output.outputs[0].logprobs):
        top = reference[position].topk(5)
        assert [token for token, entry in sorted(entries.items(), key=lambda e: e[1].rank)][:5] == top.indices.tolist()
        for token, entry in entries.items():
            assert entry.logprob == pytest.approx(float(reference[position][token]), abs=LOGPROB_TOLERANCE)


@pytest.mark.parametrize("configuration", ["sync", "async-budget-16"])
@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.3},
        {"presence_penalty": 1.5},
        {"frequency_penalty": 1.2},
        {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.4},
        {"logit_bias": {65: 9.0, 70: -100.0, 300: 4.5}},
        {"min_tokens": 6, "logit_bias": {EOS_ID: 60.0}},
    ],
    ids=str,
)
def test_what_changes_greedy_output_changes_it_as_in_the_reference(
    engine_of: Engines, judge: Judge, configuration: str, options: dict[str, object]
) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=16, **options)
    others = [Arrival(LONG, greedy(16), step=1)]
    tokens = engine_of(configuration).tokens([Arrival(PROMPTS, params), *others])
    expected = judge.tokens(PROMPTS, 16, eos_token_ids=(EOS_ID,), **options)
    assert tokens == [expected, judge.tokens(LONG, 16)]
    assert expected != judge.tokens(PROMPTS, 16), "the option changed nothing; the test shows nothing"


@pytest.mark.parametrize(("name", "value"), [("top_k", 4), ("top_p", 0.6), ("min_p", 0.2)])
def test_truncated_sampling_draws_from_the_fused_models_candidates(
    engine: InProcessEngine, judge: Judge, name: str, value: float
) -> None:
    probabilities = judge.generation(UNDECIDED, 1).logprobs[0].double().exp()
    order = probabilities.argsort(descending=True)
    before = probabilities[order].cumsum(0) - probabilities[order]
    allowed = {
        "top_k": order[:4],
        "top_p": order[before < 0.6],
        "min_p": order[probabilities[order] >= 0.2 * probabilities.max()],
    }[name].tolist()
    (output,) = engine.generate([Arrival(UNDECIDED, sampled(1, n=300, seed=5, **{name: value}))])
    drawn = {choice.token_ids[0] for choice in output.outputs}
    assert drawn <= set(allowed)
    assert len(drawn) > 1
    assert len(allowed) < 320


def test_top_k_1_is_greedy(engine: InProcessEngine, judge: Judge) -> None:
    assert engine.tokens([Arrival(PROMPTS, sampled(12, top_k=1))]) == [judge.tokens(PROMPTS, 12)]


@pytest.mark.parametrize("configuration", ["sync", "async"])
def test_a_stop_string_ends_the_response(engine_of: Engines, configuration: str) -> None:
    engine = engine_of(configuration)
    (free,) = engine.generate([Arrival(PROMPTS, greedy(40))])
    text = free.outputs[0].text
    stop = text[10:13]
    (stopped,) = engine.generate([Arrival(PROMPTS, greedy(40, stop=[stop]))])
    assert stopped.outputs[0].text == text[: text.index(stop)]
    assert (stopped.outputs[0].finish_reason, stopped.outputs[0].stop_reason) == ("stop", stop)


def test_the_fusion_files_eos_ends_the_response(engine: InProcessEngine, judge: Judge) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=9, logit_bias={EOS_ID: 100.0})
    (output,) = engine.generate([Arrival(PROMPTS, params)])
    assert (list(output.outputs[0].token_ids), output.outputs[0].finish_reason) == ([EOS_ID], "stop")
    assert judge.tokens(PROMPTS, 9, eos_token_ids=(EOS_ID,), logit_bias={EOS_ID: 100.0}) == [EOS_ID]


@pytest.mark.parametrize("configuration", ["sync", "async", *CHUNKED])
def test_structured_output_chooses_by_the_fused_logits(engine_of: Engines, judge: Judge, configuration: str) -> None:
    engine = engine_of(configuration)
    tokenizer = engine.llm.get_tokenizer()
    choices = ["alpha", "zero", "Q", "quick", "Other"]
    params = SamplingParams(temperature=0.0, max_tokens=20, structured_outputs=StructuredOutputsParams(choice=choices))
    (output,) = engine.generate([Arrival(LONG, params)])
    vocabulary = {token: tokenizer.decode([token]) for token in range(320)}
    logprobs = judge.generation(LONG, 1).logprobs[0]
    first = max(
        (token for token, text in vocabulary.items() if text and any(c.startswith(text) for c in choices)),
        key=lambda token: float(logprobs[token]),
    )
    assert output.outputs[0].token_ids[0] == first
    assert output.outputs[0].text in choices
    assert output.outputs[0].finish_reason == "stop"


@pytest.mark.parametrize("configuration", ["sync", "async-budget-16"])
def test_structured_output_yields_valid_json_beside_free_requests(
    engine_of: Engines, judge: Judge, configuration: str
) -> None:
    schema = {
        "type": "object",
        "properties": {"domain": {"enum": ["text", "code", "math"]}, "sure": {"type": "boolean"}},
        "required": ["domain", "sure"],
        "additionalProperties": False,
    }
    constrained = SamplingParams(
        temperature=0.0,
        max_tokens=120,
        structured_outputs=StructuredOutputsParams(json=schema),
    )
    arrivals = [Arrival(LONG, constrained), Arrival(PROMPTS, greedy(20)), Arrival(PROMPTS, constrained, step=3)]
    outputs = engine_of(configuration).generate(arrivals)
    for output in (outputs[0], outputs[2]):
        answer = json.loads(output.outputs[0].text)
        assert answer["domain"] in ("text", "code", "math")
        assert isinstance(answer["sure"], bool)
    assert list(outputs[1].outputs[0].token_ids) == judge.tokens(PROMPTS, 20)
