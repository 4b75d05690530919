"""Every round of every request is told once, with the reason where nothing was drafted; marks say which tokens had been
drafted."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.metrics.loggers import PrometheusStatLogger

from tests.server.engine.harness import Arrival, InProcessEngine, Noisy, greedy, random_prompts
from ultrafuser.server.engine.shared.extra_args import DRAFTED, FORCED_TOKEN_IDS
from ultrafuser.server.engine.shared.round import Round, Undrafted
from ultrafuser.server.engine.worker.drafting import Drafter, LeadingDrafter, NgramDrafter
from ultrafuser.server.engine.worker.experience import DraftCost
from ultrafuser.server.engine.worker.lookahead import Ahead, Lookahead

LENGTHS = [(13, 16, 36), (100, 20, 7), (50, 50, 50), (5, 90, 33), (64, 1, 2)]
BATCH = [random_prompts(lengths, seed) for seed, lengths in enumerate(LENGTHS)]
NUM_TOKENS = 40
ASKING = {DRAFTED: True}
Guess = Callable[[list[int]], list[int]]
"""Drafts for a request that has these output tokens."""


class Guessing:
    """Guesses as it is told, and remembers what was said: the drafts by request and number of output tokens."""

    def __init__(self, engine: InProcessEngine, guess: Guess) -> None:
        self._requests, self._guess = engine.runner.leader.requests, guess
        self.guesses: dict[str, dict[int, list[int]]] = {}

    def propose(self, plan: Mapping[str, Ahead]) -> dict[str, list[int]]:
        """The guesses."""
        found = {own: self._guess(list(self._requests[own].output_token_ids)) for own in plan}
        for request, drafts in found.items():
            self.guesses.setdefault(request, {})[len(self._requests[request].output_token_ids)] = drafts
        return found


class Remembering:
    """Another drafter's guesses, remembered."""

    def __init__(self, engine: InProcessEngine, own: Drafter) -> None:
        self._requests, self._own = engine.runner.leader.requests, own
        self.guesses: dict[str, dict[int, list[int]]] = {}

    def propose(self, plan: Mapping[str, Ahead]) -> dict[str, list[int]]:
        """What the other guesses."""
        found = self._own.propose(plan)
        for request, drafts in found.items():
            self.guesses.setdefault(request, {})[len(self._requests[request].output_token_ids)] = list(drafts)
        return found


def rounds_of(engine: InProcessEngine, drafter: Drafter, arrivals: list[Arrival]) -> tuple[list[Any], list[Round]]:
    """Serve the requests; their outputs, and all rounds that were told."""
    engine.reports.clear()
    usual, engine.drafter = engine.drafter, drafter
    try:
        outputs = engine.generate(arrivals)
    finally:
        engine.drafter = usual
    return outputs, [own for report in engine.reports for own in report.rounds]


def reasons(rounds: list[Round]) -> Counter[str | None]:
    return Counter(own.undrafted for own in rounds)


def counted_by_vllm(engine: InProcessEngine) -> tuple[float, float]:
    """vLLM's own counts of drafts and of those that were right."""
    (logger,) = [own for own in engine.llm.logger_manager.stat_loggers if isinstance(own, PrometheusStatLogger)]
    own = logger.spec_decoding_prom
    counters = own.counter_spec_decode_num_draft_tokens, own.counter_spec_decode_num_accepted_tokens
    drafts, accepted = (float(counter[0]._value.get()) for counter in counters)
    return drafts, accepted


def test_marks_are_those_of_drafts_that_held(engine_of: Callable[[str], InProcessEngine]) -> None:
    """Draft by draft: those that agree with the response up to the first that does not."""
    engine = engine_of("drafts")
    drafter = Remembering(engine, Noisy(LeadingDrafter(engine.runner.runners, 320, DraftCost())))
    arrivals = [Arrival(own, greedy(NUM_TOKENS, extra_args=ASKING), step=2 * i) for i, own in enumerate(BATCH)]
    names = engine.next_ids(len(arrivals))
    outputs, rounds = rounds_of(engine, drafter, arrivals)
    num_drafts = num_accepted = 0
    for name, output in zip(names, outputs, strict=True):
        (completion,) = output.outputs
        token_ids, wanted = list(completion.token_ids), [False] * NUM_TOKENS
        guesses = next(own for request, own in drafter.guesses.items() if request.startswith(name))
        for begin, drafts in guesses.items():
            held = drafts[: max(NUM_TOKENS - 1 - begin, 0)]
            num_drafts += len(held)
            while held != token_ids[begin : begin + len(held)]:
                held.pop()
            wanted[begin : begin + len(held)] = [True] * len(held)
        assert completion.drafted.tolist() == wanted
        num_accepted += sum(wanted)
    assert 20 < num_accepted < num_drafts
    assert sum(own.num_drafts for own in rounds) == num_drafts
    assert sum(own.num_accepted for own in rounds) == num_accepted
    assert {own.drafter for own in rounds} == {"leading", None}


@pytest.mark.parametrize("configuration", ["drafts", "drafts-budget-16", "drafts-pressure"])
def test_every_round_is_told_once(engine_of: Callable[[str], InProcessEngine], configuration: str) -> None:
    """Several responses, chunks, preemption, ends in the middle of a round."""
    engine = engine_of(configuration)
    before = counted_by_vllm(engine)
    several = SamplingParams(n=3, temperature=0.5, seed=5, max_tokens=20, ignore_eos=True, extra_args=ASKING)
    ends = greedy(NUM_TOKENS, stop_token_ids=list(range(0, 256, 9)), ignore_eos=False, extra_args=ASKING)
    arrivals = [Arrival(BATCH[0], several), Arrival(BATCH[1], ends)]
    arrivals += [Arrival(own, greedy(NUM_TOKENS, extra_args=ASKING)) for own in BATCH[2:]]
    outputs, rounds = rounds_of(engine, engine.drafter, arrivals)
    drafts, accepted = (after - own for own, after in zip(before, counted_by_vllm(engine), strict=True))
    responses = [own for output in outputs for own in output.outputs]
    num_tokens = sum(len(own.token_ids) for own in responses)
    num_drafted = sum(own.drafted.sum() for own in responses)
    assert len(responses) == len(arrivals) + 2
    assert sum(own.num_accepted for own in rounds) == num_drafted > 0
    assert sum(own.num_drafts for own in rounds) == drafts
    assert num_drafted <= accepted <= num_drafted + 4 * len(responses), "what held behind an end was not handed out"
    # A first token, and the first after a preemption, belong to no round.
    outside = num_tokens - sum(own.num_tokens for own in rounds)
    assert outside == len(responses) if configuration != "drafts-pressure" else outside >= len(responses)
    for own in rounds:
        assert (own.undrafted is None) == (own.drafter is not None) == (own.num_drafts > 0)
        assert own.num_accepted <= own.num_tokens <= own.num_accepted + 1
        assert own.num_accepted <= own.num_drafts


def test_a_given_response_was_not_drafted(engine_of: Callable[[str], InProcessEngine]) -> None:
    """It goes on in rounds all the same, which vLLM counts."""
    engine = engine_of("drafts")
    before, _ = counted_by_vllm(engine)
    (given,) = random_prompts([30], seed=9)
    params = greedy(30, extra_args={FORCED_TOKEN_IDS: given} | ASKING)
    beside = Arrival(BATCH[1], greedy(NUM_TOKENS, extra_args=ASKING))
    (output, neighbour), rounds = rounds_of(engine, engine.drafter, [Arrival(BATCH[0], params), beside])
    assert list(output.outputs[0].token_ids) == given
    assert output.outputs[0].drafted.tolist() == [False] * 30
    assert sum(own.num_tokens for own in rounds) == NUM_TOKENS - 1
    assert sum(own.num_accepted for own in rounds) == sum(neighbour.outputs[0].drafted) > 0
    assert counted_by_vllm(engine)[0] - before > 20 + sum(own.num_drafts for own in rounds)


def test_nothing_is_drafted_behind_an_end(engine_of: Callable[[str], InProcessEngine]) -> None:
    engine = engine_of("drafts")
    wanted = {own: engine.tokens([Arrival(BATCH[own], greedy(9))])[0] for own in range(len(BATCH))}
    number, token_ids = next((own, token_ids) for own, token_ids in wanted.items() if token_ids[3] not in token_ids[:3])
    right = Guessing(engine, lambda outputs: token_ids[len(outputs) : len(outputs) + 4])
    params = greedy(9, stop_token_ids=[token_ids[3]], extra_args=ASKING)
    (output,), rounds = rounds_of(engine, right, [Arrival(BATCH[number], params)])
    assert output.outputs[0].drafted.tolist() == [False, True, True, True]
    assert rounds == [Round(0, "leading", 3, 3, 3, None)]


def test_without_speculation_nothing_is_drafted(engine_of: Callable[[str], InProcessEngine]) -> None:
    engine = engine_of("sync")
    engine.reports.clear()
    (output,) = engine.generate([Arrival(BATCH[0], greedy(8, extra_args=ASKING))])
    assert output.outputs[0].drafted.tolist() == [False] * 8
    assert not any(report.rounds for report in engine.reports)


def test_a_request_that_nobody_waits_for_is_not_told(engine_of: Callable[[str], InProcessEngine]) -> None:
    engine = engine_of("drafts")
    drafter = Guessing(engine, lambda _: [])
    _, rounds = rounds_of(engine, drafter, [Arrival(BATCH[0], greedy(NUM_TOKENS), abort_after=6)])
    assert 0 < len(rounds) < 10


def test_the_last_token_is_not_drafted(engine_of: Callable[[str], InProcessEngine]) -> None:
    engine = engine_of("drafts")
    _, rounds = rounds_of(engine, engine.drafter, [Arrival(BATCH[0], greedy(2))])
    assert reasons(rounds) == {Undrafted.LAST_TOKEN: 1}


def test_a_drafter_may_find_nothing(engine_of: Callable[[str], InProcessEngine]) -> None:
    engine = engine_of("drafts")
    drafter = NgramDrafter(engine.runner.leader, 320)
    prompts = [list(range(50)), list(range(40)), list(range(30))]
    _, rounds = rounds_of(engine, drafter, [Arrival(prompts, greedy(3))])
    assert reasons(rounds) == {Undrafted.NOTHING_FOUND: 1, Undrafted.LAST_TOKEN: 1}


def test_near_the_end_of_the_context_nothing_is_drafted(engine_of: Callable[[str], InProcessEngine]) -> None:
    engine = engine_of("drafts-pressure")  # whose context has 256 tokens
    prompts = random_prompts((248, 20, 30), seed=1)
    _, rounds = rounds_of(engine, Guessing(engine, lambda _: []), [Arrival(prompts, greedy(8))])
    assert reasons(rounds) == {Undrafted.NOTHING_FOUND: 3, Undrafted.CONTEXT: 3, Undrafted.LAST_TOKEN: 1}


def test_what_the_grammar_refuses_is_not_counted_as_a_draft(engine_of: Callable[[str], InProcessEngine]) -> None:
    engine = engine_of("drafts")
    before, _ = counted_by_vllm(engine)
    params = greedy(20, ignore_eos=False, structured_outputs=StructuredOutputsParams(choice=["xyzxyz"]))
    text = [ord(letter) + 4 for letter in "xyzxyz"]  # bytes stand behind four special tokens
    wrong = Guessing(engine, lambda _: [5, 5])
    (output,), rounds = rounds_of(engine, wrong, [Arrival(BATCH[0], params)])
    assert list(output.outputs[0].token_ids)[:6] == text
    assert reasons(rounds) == {Undrafted.CUT: len(output.outputs[0].token_ids) - 1}
    assert counted_by_vllm(engine)[0] == before
    half_wrong = Guessing(engine, lambda outputs: [*text[len(outputs) : len(outputs) + 1], 5])
    _, rounds = rounds_of(engine, half_wrong, [Arrival(BATCH[0], params)])
    assert {own.num_drafts for own in rounds if own.drafter} == {1}
    assert counted_by_vllm(engine)[0] - before == sum(own.num_drafts for own in rounds)


@pytest.mark.parametrize("reason", [Undrafted.UNMEASURED, Undrafted.UNPAID])
def test_it_is_told_whether_drafts_do_not_pay_or_nobody_knows(
    engine_of: Callable[[str], InProcessEngine], monkeypatch: pytest.MonkeyPatch, reason: Undrafted
) -> None:
    engine = engine_of("drafts")
    assert engine.runner.speculation is not None
    lookahead = Lookahead(0, 4)
    monkeypatch.setattr(lookahead.step, "add", lambda *_: None)
    for _ in range(3 if reason == Undrafted.UNPAID else 0):
        lookahead.step.__class__.add(lookahead.step, 1, 1.0)
        lookahead.draft_pass.add(0, 1, 100.0)
    monkeypatch.setattr(engine.runner.speculation, "lookahead", lookahead)
    _, rounds = rounds_of(engine, engine.drafter, [Arrival(BATCH[0], greedy(9))])
    assert reasons(rounds) == {reason: 7, Undrafted.LAST_TOKEN: 1}
