"""How far to run ahead: what is chosen is worth it, whatever passes cost and however often drafts are right."""

import random
from collections.abc import Callable, Mapping

import pytest

from ultrafuser.server.engine.worker.lookahead import Cost, Lookahead

NUM_SPECIALISTS = 3
LONGEST = 4
Rate = Callable[[int, int], float]
"""How often a draft of a drafter is right for a request that another leads."""


class Machine:
    """What an engine would take for its steps, and give; random, but the same each time."""

    def __init__(self, step: tuple[float, float], draft_pass: float, rate: Rate, noise: float = 0.0) -> None:
        """`step` is the time of a step without rows and that of a row."""
        self._step, self._draft_pass, self._rate, self._noise = step, draft_pass, rate, noise
        self._random = random.Random(0)

    def serve(self, lookahead: Lookahead, leading: Mapping[str, int], num_steps: int) -> tuple[float, list[int]]:
        """Tokens a second of requests that are led like this, and how many drafts each step had."""
        plan = lookahead.choose(leading, NUM_SPECIALISTS)
        num_tokens, seconds, num_drafts = 0, 0.0, []
        for _ in range(num_steps):
            drafted = [ahead for ahead in plan.values() if ahead.num_tokens]
            drafters = {ahead.drafter for ahead in drafted}
            for drafter in drafters:
                own = [ahead.num_tokens for ahead in drafted if ahead.drafter == drafter]
                pass_seconds = self._noisy(self._draft_pass)
                lookahead.draft_pass.add(len(own), pass_seconds)
                seconds += max(own) * pass_seconds
            num_rows = len(plan) + sum(ahead.num_tokens for ahead in plan.values())
            step_seconds = self._noisy(self._step[0] + self._step[1] * num_rows)
            lookahead.step.add(num_rows, step_seconds)
            seconds += step_seconds
            for request, ahead in plan.items():
                num_right = 0
                while num_right < ahead.num_tokens and self._random.random() < self._rate(
                    ahead.drafter, leading[request]
                ):
                    num_right += 1
                num_tokens += num_right + 1
                if ahead.num_tokens:
                    lookahead.add_round(request, leading[request], ahead.drafter, ahead.num_tokens, num_right)
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
    assert chosen > 0.92 * max(fixed)


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
    lookahead.forget_all_but([])
    _, num_drafts = Machine(CPU, 0.9, own_drafts(1.0)).serve(lookahead, ALONE, 1000)
    assert min(num_drafts[-20:]) >= 2


def test_one_specialist_drafts_for_all_where_each_alone_would_cost_a_pass() -> None:
    lookahead = Lookahead(0, LONGEST)
    machine = Machine(MEMORY_BOUND, 1.0, own_drafts(0.95, foreign=0.9))
    machine.serve(lookahead, MIXED, 300)
    assert len({ahead.drafter for ahead in lookahead.choose(MIXED, NUM_SPECIALISTS).values()}) == 1


def test_a_fixed_length_is_always_taken_and_the_leading_specialist_drafts() -> None:
    plan = Lookahead(3, 3).choose(MIXED, NUM_SPECIALISTS)
    assert {request: ahead.drafter for request, ahead in plan.items()} == MIXED
    assert {ahead.num_tokens for ahead in plan.values()} == {3}


def test_a_cost_follows_rows_and_forgives_an_outlier() -> None:
    cost = Cost()
    for _ in range(50):
        for num_rows in (1, 2, 5):
            cost.add(num_rows, 2.0 + 0.5 * num_rows)
    assert cost.of(9) == pytest.approx(6.5, rel=0.05)
    cost.add(5, 1000.0)
    assert cost.of(9) < 8


def test_requests_that_have_ended_are_forgotten() -> None:
    lookahead = Lookahead(0, LONGEST)
    for name in "ab":
        lookahead.add_round(name, 0, 0, 4, 4)
    lookahead.forget_all_but(["b"])
    assert {request for request, _ in lookahead._of_requests} == {"b"}
