"""The cost of steps is learned from steps: chunks fit into the bound, whatever the machine is like and is up to."""

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from ultrafuser.server.engine.core.step_cost import FIRST_CHUNK, StepCost, Work

Machine = Callable[[Work], float]


def machine(fixed: float, per_token: float, per_position: float) -> Machine:
    """Seconds of a step on a machine with these rates."""
    return lambda work: fixed + per_token * work.num_tokens + per_position * work.num_attended


MACHINES = {
    "slow": machine(0.125, 0.062, 3e-5),
    "medium": machine(0.19, 0.012, 1e-5),
    "fast": machine(0.02, 0.001, 1e-6),
    "one whose small steps wait for memory": lambda work: max(0.19, 0.012 * work.num_tokens) + 1e-5 * work.num_attended,
}
each_machine = pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
BOUND = 1.0
STREAMS = Work.span(100, 1) + Work.span(300, 1) + Work.span(20, 1) + Work.span(700, 1)


@dataclass
class Step:
    """What a prompt got in one step, and how long the step took."""

    num_tokens: int
    seconds: float


def read_prompt(
    cost: StepCost, seconds_of: Machine, length: int = 2000, decodes: Work = STREAMS, start: int = 0
) -> list[Step]:
    """Read a prompt as the scheduler would, beside decodes."""
    steps = []
    while start < length:
        num_tokens = min(cost.chunk(BOUND, decodes, start), length - start)
        work = decodes + Work.span(start, num_tokens)
        steps.append(Step(num_tokens, seconds_of(work)))
        cost.learn(work, num_tokens, steps[-1].seconds)
        start += num_tokens
    return steps


def decode(cost: StepCost, seconds_of: Machine, num_steps: int) -> None:
    for _ in range(num_steps):
        cost.learn(STREAMS, 0, seconds_of(STREAMS))


def noisy(seconds_of: Machine, spread: float, spikes: float = 0.0) -> Machine:
    """The machine with others on it: every step varies, some are held up for long."""
    rng = random.Random(0)
    return lambda work: (
        seconds_of(work) * rng.lognormvariate(0, spread) * (rng.uniform(3, 8) if rng.random() < spikes else 1)
    )


def test_the_first_chunk_is_small_since_nothing_was_measured() -> None:
    assert StepCost().chunk(BOUND, Work(), 0) == FIRST_CHUNK


@each_machine
def test_no_step_is_longer_than_the_bound(machine: Machine) -> None:
    assert max(step.seconds for step in read_prompt(StepCost(), machine)) <= BOUND


@each_machine
def test_the_bound_is_made_use_of(machine: Machine) -> None:
    """A bound that is kept by steps that are all too short would cost the prompt its time."""
    cost = StepCost()
    read_prompt(cost, machine)
    steps = read_prompt(cost, machine)
    assert all(step.seconds > 0.8 * BOUND for step in steps[3:-1])


@each_machine
def test_no_chunk_is_more_than_twice_the_one_before(machine: Machine) -> None:
    cost = StepCost()
    for length in (2000, 30, 700, 2000):
        steps = read_prompt(cost, machine, length)
        assert all(later.num_tokens <= 2 * max(earlier.num_tokens, 1) for earlier, later in itertools.pairwise(steps))


def test_a_chunk_becomes_smaller_the_further_a_prompt_is_read() -> None:
    steps = read_prompt(StepCost(), MACHINES["medium"])
    assert steps[-2].num_tokens < 0.6 * max(step.num_tokens for step in steps)


def test_a_prompt_that_begins_far_behind_fits_too() -> None:
    """Its first part was found in the prefix cache, so that none of its chunks has shown what the far ones cost."""
    cost = StepCost()
    read_prompt(cost, MACHINES["medium"], length=1000)
    steps = read_prompt(cost, MACHINES["medium"], start=3000, length=3500)
    assert max(step.seconds for step in steps) <= BOUND


@each_machine
def test_noise_moves_steps_no_further_than_it_moves_itself(machine: Machine) -> None:
    seconds = sorted(step.seconds for step in read_prompt(StepCost(), noisy(machine, spread=0.15)))
    assert seconds[len(seconds) // 2] <= BOUND
    assert seconds[int(len(seconds) * 0.95)] <= 1.5 * BOUND


def test_a_step_that_was_held_up_is_soon_forgotten() -> None:
    cost = StepCost()
    read_prompt(cost, MACHINES["medium"], length=600)
    before = cost.chunk(BOUND, STREAMS, 600)
    work = STREAMS + Work.span(600, before)
    cost.learn(work, before, 10 * MACHINES["medium"](work))
    assert cost.chunk(BOUND, STREAMS, 600) < before
    steps = read_prompt(cost, MACHINES["medium"], start=600, length=1500)
    assert max(step.seconds for step in steps) <= BOUND
    assert steps[6].num_tokens > 0.7 * before


@each_machine
def test_prompts_keep_to_the_bound_on_a_machine_with_spikes(machine: Machine) -> None:
    """Of the steps that are not held up themselves, almost all do."""
    seconds = sorted(step.seconds for step in read_prompt(StepCost(), noisy(machine, spread=0.05, spikes=0.05)))
    assert seconds[int(len(seconds) * 0.8)] <= 1.1 * BOUND


def test_a_machine_that_becomes_slow_is_followed_and_so_is_its_recovery() -> None:
    cost = StepCost()
    read_prompt(cost, MACHINES["fast"])
    slow = read_prompt(cost, lambda work: 4 * MACHINES["fast"](work))
    assert all(step.seconds <= 1.5 * BOUND for step in slow[3:])
    recovered = read_prompt(cost, MACHINES["fast"], length=4000)
    assert max(step.seconds for step in recovered) <= 1.2 * BOUND
    assert recovered[5].seconds > 0.6 * BOUND


def test_hours_of_decoding_do_not_make_prompts_forgotten() -> None:
    cost = StepCost()
    read_prompt(cost, MACHINES["medium"])
    decode(cost, noisy(MACHINES["medium"], spread=0.1), 1000)
    steps = read_prompt(cost, MACHINES["medium"])
    assert max(step.seconds for step in steps) <= 1.1 * BOUND
    assert steps[0].seconds > 0.5 * BOUND


def test_a_prompt_goes_on_where_decodes_alone_exceed_the_bound() -> None:
    """A quarter of their time is for prompts: one token a step would keep a prompt of 2,000 waiting for hours."""
    slow = machine(5.0, 0.5, 1e-6)
    steps = read_prompt(StepCost(), slow, length=200)
    assert max(step.seconds for step in steps[4:]) <= 1.3 * slow(STREAMS)
    assert len(steps) < 150


def test_there_is_always_a_token() -> None:
    """Also where one token alone costs more than the bound."""
    cost = StepCost()
    steps = read_prompt(cost, machine(0.0, 50.0, 0.0), length=40, decodes=Work())
    assert sum(step.num_tokens for step in steps) == 40
    assert [step.num_tokens for step in steps[4:]] == [1] * len(steps[4:])


def test_drafts_count_like_other_tokens() -> None:
    cost = StepCost()
    read_prompt(cost, MACHINES["slow"])
    with_drafts = Work.span(100, 4) + Work.span(300, 4)
    assert cost.chunk(BOUND, with_drafts, 0) < cost.chunk(BOUND, Work.span(100, 1) + Work.span(300, 1), 0)
