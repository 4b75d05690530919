"""How far to run ahead: what is chosen is worth it, whatever passes cost and however often drafts are right."""

import random
from collections.abc import Callable, Mapping

import pytest

from ultrafuser.server.engine.worker.experience import MIN_SAMPLES, DraftCost
from ultrafuser.server.engine.worker.lookahead import NGRAM, Ahead, Lookahead, Match

NUM_SPECIALISTS = 3
LONGEST = 4
Rate = Callable[[int, int], float]
"""How often a draft of a drafter is right for a request that another leads."""


class Machine:
    """What an engine would take for its steps, and give; random, but the same each time. What it measures is noisy."""

    def __init__(
        self, step: tuple[float, float], draft_pass: float, rate: Rate, noise: float = 0.0, side_by_side: bool = False
    ) -> None:
        """`step` is the time of a step without rows and that of a row; `side_by_side`: drafters do not wait for each
        other."""
        self._step, self._draft_pass, self._rate, self._noise = step, draft_pass, rate, noise
        self._side_by_side = side_by_side
        self._random = random.Random(0)

    def serve(self, lookahead: Lookahead, leading: Mapping[str, int], num_steps: int) -> tuple[float, list[int]]:
        """Tokens a second of requests that are led like this, and how many drafts each step had."""
        plan = lookahead.choose(leading, NUM_SPECIALISTS)
        num_tokens, seconds, num_drafts = 0, 0.0, []
        for _ in range(num_steps):
            drafted = [ahead for ahead in plan.values() if ahead.num_tokens]
            drafters = {ahead.drafter for ahead in drafted}
            passes = [0]
            for drafter in drafters:
                own = [ahead.num_tokens for ahead in drafted if ahead.drafter == drafter]
                lookahead.draft_pass.add(drafter, len(own), self._noisy(self._draft_pass))
                passes.append(max(own))
            seconds += (max(passes) if self._side_by_side else sum(passes)) * self._draft_pass
            num_rows = len(plan) + sum(ahead.num_tokens for ahead in plan.values())
            step_seconds = self._step[0] + self._step[1] * num_rows
            lookahead.step.add(num_rows, self._noisy(step_seconds))
            seconds += step_seconds
            for request, ahead in plan.items():
                num_right = 0
                while num_right < ahead.num_tokens and self._random.random() < self._rate(
                    ahead.drafter, leading[request]
                ):
                    num_right += 1
                num_tokens += num_right + 1
                if ahead.num_tokens:
                    lookahead.experience.add(request, ahead.drafter, leading[request], ahead.num_tokens, num_right)
            num_drafts.append(num_rows - len(plan))
            plan = lookahead.choose(leading, NUM_SPECIALISTS)
        return num_tokens / seconds, num_drafts

    def _noisy(self, seconds: float) -> float:
        slow = 20.0 if self._random.random() < self._noise / 10 else 1.0  # another program's turn
        return seconds * slow * (1 + self._noise * self._random.uniform(-1, 1))


def own_drafts(right: float, foreign: float = 0.5) -> Rate:
    """Drafts of the leading specialist are right more often than those of another."""
    return lambda drafter, leading: right if drafter == leading else foreign


ALONE = {"a": 0}
MIXED = {"a": 0, "b": 1, "c": 2, "d": 0}
CPU, SLOW_ROWS, MEMORY_BOUND = (2.4, 0.25), (1.0, 2.0), (3.0, 0.01)


@pytest.mark.parametrize("leading", [ALONE, MIXED])
@pytest.mark.parametrize("right", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("step", [CPU, SLOW_ROWS, MEMORY_BOUND])
def test_no_fixed_length_is_much_quicker(step: tuple[float, float], right: float, leading: dict[str, int]) -> None:
    def rate_of(lookahead: Lookahead) -> float:
        machine = Machine(step, 0.9, own_drafts(right), noise=0.2)
        machine.serve(lookahead, leading, 100)
        return machine.serve(lookahead, leading, 600)[0]

    chosen = rate_of(Lookahead(0, LONGEST))
    fixed = [rate_of(Lookahead(length, length)) for length in range(LONGEST + 1)]
    assert chosen > 0.95 * max(fixed)


def test_drafts_that_are_never_right_are_tried_one_step_in_fifty() -> None:
    lookahead = Lookahead(0, LONGEST)
    machine = Machine(CPU, 0.9, own_drafts(0.0))
    machine.serve(lookahead, ALONE, 100)
    _, num_drafts = machine.serve(lookahead, ALONE, 500)
    assert set(num_drafts) == {0, 1}
    assert sum(num_drafts) == 10


def test_drafts_that_become_right_are_found_again() -> None:
    lookahead = Lookahead(0, LONGEST)
    Machine(CPU, 0.9, own_drafts(0.0)).serve(lookahead, ALONE, 200)
    lookahead.experience.forget_all_but([])
    _, num_drafts = Machine(CPU, 0.9, own_drafts(1.0)).serve(lookahead, ALONE, 1000)
    assert min(num_drafts[-20:]) >= 2


def test_drafts_that_become_right_are_found_again_beside_other_drafts_that_hold() -> None:
    """Of another kind of requests, or looked up: those must not keep a specialist from being tried."""
    lookahead = learned(right=0.0, looked_up_right=1.0)
    two = {"a": 0, "b": 1}
    found = {request: Match(5, LONGEST) for request in two}
    tried = [lookahead.choose(two, NUM_SPECIALISTS, found if step % 20 else None) for step in range(500)]
    num_tried = {own: sum(plan[own] == Ahead(two[own], 1) for plan in tried) for own in two}
    assert all(num_tried.values()), "each of them"
    assert sum(num_tried.values()) <= 10, "one step in fifty"


def test_a_specialists_pass_is_taken_at_its_own_cost() -> None:
    cost = DraftCost()
    for _ in range(20):
        cost.add(0, 1, 1.0)
        cost.add(1, 1, 10.0)
    assert cost.of(0, 1) == pytest.approx(1.0)
    assert cost.of(1, 1) == pytest.approx(10.0)
    assert 1 < cost.of(2, 1) < 10, "of one that was never measured as long as the others'"


def test_one_specialist_drafts_for_all_where_each_alone_would_cost_a_pass() -> None:
    lookahead = Lookahead(0, LONGEST)
    machine = Machine(MEMORY_BOUND, 1.0, own_drafts(0.95, foreign=0.9))
    machine.serve(lookahead, MIXED, 300)
    assert len({ahead.drafter for ahead in lookahead.choose(MIXED, NUM_SPECIALISTS).values()}) == 1


def taught(machine: Machine, side_by_side: bool) -> dict[str, Ahead]:
    """How mixed requests go on when a machine has been measured."""
    lookahead = Lookahead(0, LONGEST, side_by_side=side_by_side)
    machine.serve(lookahead, MIXED, 300)
    return lookahead.choose(MIXED, NUM_SPECIALISTS)


def test_a_draft_that_takes_as_long_as_a_step_saves_nothing() -> None:
    """As where each specialist has devices of its own: a step takes the slowest one's pass, and so does a draft."""
    always_right = own_drafts(1.0, foreign=1.0)
    for draft_pass, is_worth_it in [(1.0, False), (0.1, True)]:
        plan = taught(Machine((1.0, 0.01), draft_pass, always_right, side_by_side=True), side_by_side=True)
        assert any(ahead.num_tokens for ahead in plan.values()) == is_worth_it


@pytest.mark.parametrize("side_by_side", [True, False])
def test_specialists_that_draft_side_by_side_share_the_time_of_a_pass(side_by_side: bool) -> None:
    """Half a step long: too long for the requests that one of them leads, not for all requests together."""
    machine = Machine((1.0, 0.001), 0.5, own_drafts(0.95, foreign=0.0), side_by_side=side_by_side)
    plan = taught(machine, side_by_side)
    assert drafters_of(plan) == (MIXED if side_by_side else {})


@pytest.mark.parametrize("right", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("draft_pass", [0.05, 0.4, 0.9])
def test_no_fixed_length_is_much_quicker_side_by_side(draft_pass: float, right: float) -> None:
    def rate_of(lookahead: Lookahead) -> float:
        machine = Machine((1.0, 0.02), draft_pass, own_drafts(right), noise=0.2, side_by_side=True)
        machine.serve(lookahead, MIXED, 100)
        return machine.serve(lookahead, MIXED, 600)[0]

    chosen = rate_of(Lookahead(0, LONGEST, side_by_side=True))
    fixed = [rate_of(Lookahead(length, length, side_by_side=True)) for length in range(LONGEST + 1)]
    assert chosen > 0.95 * max(fixed)


@pytest.mark.parametrize(("promised", "num_drafts"), [(1.02, 0), (1.04, 1)])
def test_drafts_must_promise_three_percent_more(promised: float, num_drafts: int) -> None:
    lookahead = Lookahead(0, 1)
    lookahead.step.add(1, 1.0)
    for _ in range(MIN_SAMPLES):
        lookahead.step.add(2, 1.1)
    tokens = 1 + lookahead.experience.rate("a", 0, 0)
    for _ in range(MIN_SAMPLES):
        lookahead.draft_pass.add(0, 1, tokens / promised * lookahead.step.of(1) - lookahead.step.of(2))
    assert lookahead.choose(ALONE, NUM_SPECIALISTS)["a"].num_tokens == num_drafts


def test_a_fixed_length_is_always_taken_and_the_leading_specialist_drafts() -> None:
    plan = Lookahead(3, 3).choose(MIXED, NUM_SPECIALISTS)
    assert {request: ahead.drafter for request, ahead in plan.items()} == MIXED
    assert {ahead.num_tokens for ahead in plan.values()} == {3}


def learned(right: float, looked_up_right: float, step: tuple[float, float] = CPU) -> Lookahead:
    """What a machine teaches whose leading specialist's drafts, and those that were seen before, are right so often."""
    lookahead = Lookahead(0, LONGEST)
    Machine(step, 0.9, own_drafts(right)).serve(lookahead, MIXED, 200)
    for _ in range(100):
        for request in MIXED:
            lookahead.experience.add(request, NGRAM, 5, LONGEST, int(looked_up_right * LONGEST))
    return lookahead


def drafters_of(plan: Mapping[str, Ahead]) -> dict[str, int]:
    """Who drafts for each request that is drafted for."""
    return {request: ahead.drafter for request, ahead in plan.items() if ahead.num_tokens}


def test_what_was_seen_before_is_taken_where_it_is_as_often_right_since_it_costs_no_pass() -> None:
    lookahead = learned(right=0.9, looked_up_right=1.0)
    everywhere = dict.fromkeys(MIXED, Match(5, LONGEST))
    assert drafters_of(lookahead.choose(MIXED, NUM_SPECIALISTS, everywhere)) == dict.fromkeys(MIXED, NGRAM)
    assert NGRAM not in drafters_of(lookahead.choose(MIXED, NUM_SPECIALISTS)).values()


def test_a_specialist_drafts_where_what_was_seen_before_is_seldom_right() -> None:
    lookahead = learned(right=0.95, looked_up_right=0.0)
    plan = lookahead.choose(ALONE, NUM_SPECIALISTS, {"a": Match(5, LONGEST)})
    assert drafters_of(plan) == ALONE


def test_no_more_is_drafted_than_was_seen() -> None:
    lookahead = learned(right=0.0, looked_up_right=1.0)
    plan = lookahead.choose(ALONE, NUM_SPECIALISTS, {"a": Match(5, 2)})
    assert plan == {"a": Ahead(NGRAM, 2)}


def test_what_was_found_for_one_request_leaves_the_others_their_specialists() -> None:
    lookahead = learned(right=0.95, looked_up_right=1.0, step=MEMORY_BOUND)
    found = {request: Match(5, LONGEST if request == "b" else 0) for request in MIXED}
    drafters = drafters_of(lookahead.choose(MIXED, NUM_SPECIALISTS, found))
    assert drafters["b"] == NGRAM
    assert NGRAM not in {drafters[own] for own in drafters if own != "b"}


def test_without_specialists_only_what_was_seen_is_drafted() -> None:
    lookahead = Lookahead(0, LONGEST, only_looks_up=True)
    for _ in range(MIN_SAMPLES):
        lookahead.step.add(1, 1.0)
    lookahead.step.add(5, 1.1)
    plan = lookahead.choose(MIXED, NUM_SPECIALISTS, {request: Match(0, 0) for request in MIXED} | {"a": Match(5, 3)})
    assert drafters_of(plan) == {"a": NGRAM}
