"""Drafts change nothing but the number of steps: right or wrong, the tokens are those of decoding without them."""

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.core.sched.output import SchedulerOutput

from tests.server.engine.conftest import DRAFTS
from tests.server.engine.harness import Arrival, InProcessEngine, Noisy, greedy, random_prompts, serve
from tests.server.engine.judge import Judge
from ultrafuser.server.engine.shared.extra_args import GATE_WEIGHTS
from ultrafuser.server.engine.worker import verifying
from ultrafuser.server.engine.worker.drafting import Drafter, EitherDrafter, LeadingDrafter, NgramDrafter
from ultrafuser.server.engine.worker.experience import DraftCost
from ultrafuser.server.engine.worker.lookahead import NGRAM, Ahead

LENGTHS = [(13, 16, 36), (100, 20, 7), (50, 50, 50), (5, 90, 33), (64, 1, 2), (40, 33, 31)]
BATCH = [random_prompts(lengths, seed) for seed, lengths in enumerate(LENGTHS)]
NUM_TOKENS = 40


class Oracle:
    """Knows the answers, by the leader's prompt, and spoils a share of its guesses."""

    def __init__(self, engine: InProcessEngine, answers: dict[tuple[int, ...], list[int]], share_wrong: float) -> None:
        self._requests = engine.runner.leader.requests
        self._answers, self._share_wrong = answers, share_wrong
        self._random = random.Random(0)
        self.num_drafted = 0

    def propose(self, plan: Mapping[str, Ahead]) -> dict[str, list[int]]:
        """The answers' next tokens."""
        found = {}
        for request, ahead in plan.items():
            state = self._requests[request]
            assert state.prompt_token_ids is not None
            num_outputs = len(state.output_token_ids)
            answer = self._answers[tuple(state.prompt_token_ids)]
            assert list(state.output_token_ids) == answer[:num_outputs]
            drafts = [self._spoilt(token) for token in answer[num_outputs : num_outputs + ahead.num_tokens]]
            if self._share_wrong:  # drafts of unequal length, none among them
                del drafts[self._random.randrange(ahead.num_tokens + 1) :]
            found[request] = drafts
            self.num_drafted += len(drafts)
        return found

    def _spoilt(self, token: int) -> int:
        return self._random.randrange(256) if self._random.random() < self._share_wrong else token


@pytest.mark.parametrize("apart", [0, 1, 3])
@pytest.mark.parametrize("share_wrong", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("configuration", ["drafts", "drafts-budget-16", "drafts-pressure"])
def test_tokens_and_weights_are_the_references(
    engine_of: Callable[[str], InProcessEngine], judge: Judge, configuration: str, share_wrong: float, apart: int
) -> None:
    engine = engine_of(configuration)
    wanted = [judge.generation(prompts, NUM_TOKENS) for prompts in BATCH]
    answers = {tuple(prompts[0]): list(own.token_ids) for prompts, own in zip(BATCH, wanted, strict=True)}
    params = greedy(NUM_TOKENS, extra_args={GATE_WEIGHTS: True})
    arrivals = [Arrival(prompts, params, step=index * apart) for index, prompts in enumerate(BATCH)]
    oracle = Oracle(engine, answers, share_wrong)
    outputs, num_steps = serve(engine, oracle, arrivals)
    for output, own in zip(outputs, wanted, strict=True):
        assert list(output.outputs[0].token_ids) == list(own.token_ids)
        np.testing.assert_allclose(output.outputs[0].gate_weights, own.gate_weights.numpy(), atol=1e-4)
    assert oracle.num_drafted > 100
    if share_wrong == 0 and configuration == "drafts":
        assert num_steps < NUM_TOKENS / 2 + len(BATCH) * apart


class Alternating:
    """Plans of a drafter that takes both kinds: what was seen before for every other request."""

    def __init__(self, own: Drafter) -> None:
        self._own = own

    def propose(self, plan: Mapping[str, Ahead]) -> dict[str, list[int]]:
        """Guesses of both."""
        mixed = enumerate(plan.items())
        return self._own.propose({own: replace(ahead, drafter=NGRAM) if i % 2 else ahead for i, (own, ahead) in mixed})


def drafter_of_kind(kind: str, engine: InProcessEngine) -> Drafter:
    """One of our drafters for the engine."""
    runners = engine.runner.runners
    leading, ngram = LeadingDrafter(runners, 320, DraftCost()), NgramDrafter(runners[0], 320)
    kinds: dict[str, Drafter] = {
        "leading": leading,
        "ngram": ngram,
        "either": Alternating(EitherDrafter(leading, ngram)),
    }
    return kinds[kind]


@pytest.mark.parametrize("kind", ["leading", "ngram", "either"])
@pytest.mark.parametrize("configuration", ["drafts", "drafts-budget-16", "drafts-pressure"])
def test_each_drafter_leaves_the_tokens_as_they_are(
    engine_of: Callable[[str], InProcessEngine], judge: Judge, configuration: str, kind: str
) -> None:
    engine = engine_of(configuration)
    drafter = drafter_of_kind(kind, engine)
    arrivals = [Arrival(prompts, greedy(NUM_TOKENS), step=index) for index, prompts in enumerate(BATCH)]
    outputs, _ = serve(engine, drafter, arrivals)
    assert [list(own.outputs[0].token_ids) for own in outputs] == [judge.tokens(own, NUM_TOKENS) for own in BATCH]


def test_what_runs_by_default_leaves_the_tokens_as_they_are(
    engine_of: Callable[[str], InProcessEngine], judge: Judge
) -> None:
    engine = engine_of("speculation")
    arrivals = [Arrival(prompts, greedy(NUM_TOKENS), step=index) for index, prompts in enumerate(BATCH)]
    outputs = engine.generate(arrivals)
    assert [list(own.outputs[0].token_ids) for own in outputs] == [judge.tokens(own, NUM_TOKENS) for own in BATCH]


class Telling:
    """Guesses as it is told, by the request's tokens so far."""

    def __init__(self, engine: InProcessEngine, guess: Callable[[int], list[int]]) -> None:
        self._requests, self._guess = engine.runner.leader.requests, guess

    def propose(self, plan: Mapping[str, Ahead]) -> dict[str, list[int]]:
        """The guesses."""
        return {own: self._guess(len(self._requests[own].output_token_ids)) for own in plan}


@pytest.fixture
def learned(engine_of: Callable[[str], InProcessEngine], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[Any]]:
    """What an engine learns of drafts from now on: by whom, of what kind, how many, how many were right."""

    def listen(configuration: str) -> list[Any]:
        speculation = engine_of(configuration).runner.speculation
        assert speculation is not None
        found: list[Any] = []
        monkeypatch.setattr(speculation.lookahead.experience, "add", lambda _, *own: found.append(own))
        return found

    return listen


@pytest.mark.parametrize("num_right", [0, 1, 4])
def test_it_is_learned_how_many_drafts_held(
    engine_of: Callable[[str], InProcessEngine], judge: Judge, learned: Callable[[str], list[Any]], num_right: int
) -> None:
    engine, answer, found = engine_of("drafts"), list(judge.tokens(BATCH[0], 17)), learned("drafts")

    def guess(num_outputs: int) -> list[int]:
        right = answer[num_outputs : num_outputs + num_right]
        return (right + [(token + 1) % 256 for token in answer[num_outputs + len(right) :]])[:4]

    (output,), _ = serve(engine, Telling(engine, guess), [Arrival(BATCH[0], greedy(17))])
    assert list(output.outputs[0].token_ids) == answer
    whole = [own[2:] for own in found if own[2] == 4]  # the last ones are cut by the response's end
    assert set(whole) == {(4, num_right)}
    assert len(whole) >= 12 // (num_right + 1)
    assert {drafter == leading for drafter, leading, *_ in found} == {True}


def test_drafts_that_the_grammar_refuses_are_learned_as_wrong(
    engine_of: Callable[[str], InProcessEngine], learned: Callable[[str], list[Any]]
) -> None:
    engine, found = engine_of("drafts"), learned("drafts")
    params = greedy(20, ignore_eos=False, structured_outputs=StructuredOutputsParams(choice=["xyzxyz"]))
    serve(engine, Telling(engine, lambda _: [5, 5]), [Arrival(BATCH[0], params)])
    assert len(found) >= 5
    assert {own[2:] for own in found} == {(2, 0)}


def test_what_was_looked_up_is_compared_with_what_came_though_nobody_took_it(
    engine_of: Callable[[str], InProcessEngine],
    judge: Judge,
    learned: Callable[[str], list[Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, answer, found = engine_of("speculation"), list(judge.tokens(BATCH[0], 17)), learned("speculation")
    speculation = engine.runner.speculation
    assert speculation is not None
    requests = engine.runner.leader.requests

    def look_up(request: str, num_tokens: int) -> tuple[int, list[int]]:
        place = len(requests[request].output_token_ids)
        return 3, [*answer[place : place + 1], 256]  # one right, one that never comes

    assert speculation._ngram is not None
    monkeypatch.setattr(speculation._ngram, "look_up", look_up)
    serve(engine, Telling(engine, lambda _: []), [Arrival(BATCH[0], greedy(17))])
    assert [own for own in found if own[0] == NGRAM] == [(NGRAM, 3, 1, 1)] * 15


VARIANTS: list[dict[str, Any]] = [
    {"seed": 3},
    {"seed": 4, "top_p": 0.8},
    {"seed": 5, "top_k": 5},
    {"seed": 6, "min_p": 0.05},
    {"seed": 7, "logit_bias": {65: 4.0, 70: -9.0}},
    {"seed": 8, "repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.2},
    {"seed": 9, "n": 2},
    {"seed": 10, "min_tokens": 9, "stop_token_ids": list(range(0, 256, 2))},
    {"seed": 11, "bad_words": ["e", "th"]},
    {"seed": 12, "allowed_token_ids": list(range(60, 120))},
    {"temperature": 0.0, "logprobs": None},
    {"temperature": 0.0, "min_tokens": 12, "ignore_eos": False, "stop_token_ids": list(range(0, 256, 3))},
]


def told(output: Any) -> list[Any]:
    """Tokens and log probabilities of every response."""
    return [
        (
            list(own.token_ids),
            [{token: round(entry.logprob, 3) for token, entry in step.items()} for step in own.logprobs or ()],
        )
        for own in sorted(output.outputs, key=lambda own: own.index)
    ]


@pytest.mark.parametrize("configuration", ["drafts", "drafts-budget-16"])
def test_seeded_tokens_and_logprobs_are_those_without_drafts(
    engine_of: Callable[[str], InProcessEngine], configuration: str
) -> None:
    def params(variant: dict[str, Any]) -> SamplingParams:
        return SamplingParams(**{"temperature": 1.0, "ignore_eos": True, "max_tokens": 24, "logprobs": 2, **variant})

    prompts = [*BATCH, *BATCH]
    arrivals = [
        Arrival(own, params(variant), step=index)
        for index, (own, variant) in enumerate(zip(prompts, VARIANTS, strict=True))
    ]
    wanted = [told(own) for own in engine_of("sync").generate(arrivals)]
    engine = engine_of(configuration)
    outputs, _ = serve(engine, Noisy(LeadingDrafter(engine.runner.runners, 320, DraftCost())), arrivals)
    assert [told(own) for own in outputs] == wanted


def accept_wrong_drafts(best_N: Tensor, drafted: list[list[int]]) -> Tensor:
    """As if every draft held."""
    rows = [sum(1 + len(own) for own in drafted[:slot]) + len(own) for slot, own in enumerate(drafted)]
    return verifying._padded([[*own, int(best_N[row])] for own, row in zip(drafted, rows, strict=True)], best_N.device)


def look_one_row_too_far(best_N: Tensor, drafted: list[list[int]]) -> Tensor:
    """As if a row were behind the draft after its own."""
    return agreed(best_N.roll(-1), drafted)


def hand_out_the_refused_draft(best_N: Tensor, drafted: list[list[int]]) -> Tensor:
    """As if a wrong draft counted, too, behind the token in its place."""
    tokens = [[token for token in own if token >= 0] for own in agreed(best_N, drafted).tolist()]
    longer = [[*own, *drafts[len(own) - 1 :][:1]] for own, drafts in zip(tokens, drafted, strict=True)]
    return verifying._padded(longer, best_N.device)


agreed = verifying._agreed


@pytest.mark.parametrize("broken", [accept_wrong_drafts, look_one_row_too_far, hand_out_the_refused_draft])
def test_a_broken_verification_is_noticed(
    tiny_fusion: Path, judge: Judge, monkeypatch: pytest.MonkeyPatch, broken: Callable[..., Tensor]
) -> None:
    """The tests above can fail."""
    wanted = [judge.tokens(prompts, NUM_TOKENS) for prompts in BATCH]
    arrivals = [Arrival(prompts, greedy(NUM_TOKENS)) for prompts in BATCH]
    with InProcessEngine(tiny_fusion, **DRAFTS) as engine:
        engine.drafter = Noisy(engine.drafter)
        assert engine.tokens(arrivals) == wanted
        monkeypatch.setattr(verifying, "_agreed", broken)
        assert engine.llm.reset_prefix_cache()
        assert engine.tokens(arrivals) != wanted


def test_limits_count_every_token_of_a_round(engine_of: Callable[[str], InProcessEngine], judge: Judge) -> None:
    """A stop string, a stop token and the most tokens, each in the middle of what one step gives."""
    engine = engine_of("drafts")
    prompts = BATCH[0]
    wanted = judge.tokens(prompts, NUM_TOKENS)
    answers = {tuple(prompts[0]): wanted}
    tokenizer = engine.llm.get_tokenizer()
    for number in range(1, 12):
        last = wanted[number - 1]
        oracle = Oracle(engine, answers, share_wrong=0.0)
        text = tokenizer.decode([last])
        limits: list[dict[str, Any]] = [{"max_tokens": number}, {"stop_token_ids": [last]}]
        limits += [{"stop": [text]}] if text.isascii() else []
        for limit in limits:
            params = greedy(**{"max_tokens": NUM_TOKENS, "logprobs": 0, "extra_args": {GATE_WEIGHTS: True}, **limit})
            ((output,), _) = serve(engine, oracle, [Arrival(prompts, params)])
            (completion,) = output.outputs
            end = number if "max_tokens" in limit else wanted.index(last) + 1
            if "stop" in limit:
                end = next(end for end in range(len(wanted)) if text in tokenizer.decode(wanted[:end]))
            assert list(completion.token_ids) == wanted[:end]
            assert len(completion.logprobs) == len(completion.gate_weights) == end
            assert completion.finish_reason == ("length" if "max_tokens" in limit else "stop")


def test_the_context_is_filled_to_its_last_token(engine_of: Callable[[str], InProcessEngine], judge: Judge) -> None:
    engine = engine_of("drafts-pressure")  # whose context has 256 tokens
    for longest in (200, 215, 216, 217, 218):
        prompts = random_prompts((longest, 20, 30), seed=longest)
        params = greedy(256 - longest)
        answers = {tuple(prompts[0]): judge.tokens(prompts, 256 - longest)}
        ((output,), _) = serve(engine, Oracle(engine, answers, share_wrong=0.1), [Arrival(prompts, params)])
        assert list(output.outputs[0].token_ids) == answers[tuple(prompts[0])]


def test_drafts_leave_every_request_its_token_in_each_step(
    engine_of: Callable[[str], InProcessEngine], judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of 16 tokens held the drafts of the first three requests, and the others stood until those had ended."""
    engine = engine_of("drafts-budget-16")
    schedule, left_out = engine.scheduler.schedule, set()

    def watched(*args: Any) -> SchedulerOutput:
        decoding = {own.request_id for own in engine.scheduler.running if not own.is_prefill_chunk}
        output = schedule(*args)
        left_out.update(decoding - output.num_scheduled_tokens.keys())
        return output

    monkeypatch.setattr(engine.scheduler, "schedule", watched)
    wanted = {tuple(own[0]): judge.tokens(own, NUM_TOKENS) for own in BATCH}
    outputs, _ = serve(
        engine, Oracle(engine, wanted, share_wrong=0.0), [Arrival(own, greedy(NUM_TOKENS)) for own in BATCH]
    )
    assert [list(own.outputs[0].token_ids) for own in outputs] == list(wanted.values())
    assert not left_out
