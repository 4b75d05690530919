"""Steps keep to a bound of time, in vLLM's own scheduler: decodes first, then as much of the prompts as fits."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

from tests.server.engine.harness import Arrival, InProcessEngine, greedy, random_prompts
from tests.server.engine.judge import Judge
from ultrafuser.server.engine.core.pacing import Pace
from ultrafuser.server.engine.core.step_cost import FIRST_CHUNK, StepCost, Work

Engines = Callable[[str], InProcessEngine]
BOUND = 1.0
MAX_TOKENS = 4096


@dataclass
class Run:
    """An engine whose steps take the time that a slow machine would, by a clock that does not run by itself."""

    engine: InProcessEngine
    now: float = 0.0
    steps: list[dict[str, int]] = field(default_factory=list)
    """Tokens of each request, by step."""
    seconds: list[float] = field(default_factory=list)

    def serve(self, *arrivals: Arrival) -> tuple[list[str], list[Any]]:
        """The ids of the requests, and their last outputs; only the steps of this call are remembered."""
        self.steps.clear()
        self.seconds.clear()
        names = self.engine.next_ids(len(arrivals))
        outputs = self.engine.generate(arrivals)
        self.steps = [{name.split("-")[0]: num for name, num in step.items()} for step in self.steps]
        return names, outputs

    def first_token(self, name: str, length: int) -> int:
        """The step in which a prompt of that length is read to its end."""
        read = 0
        for index, step in enumerate(self.steps):
            read += step.get(name, 0)
            if read >= length:
                return index
        raise AssertionError(f"{name} was never read to its end")

    def take(self, output: Any, requests: dict[str, Request]) -> None:
        """Let the time of a step go by."""
        work = Work()
        for name, num_tokens in output.num_scheduled_tokens.items():
            work += Work.span(requests[name].num_computed_tokens - num_tokens, num_tokens)
        seconds = 0.15 + 0.01 * work.num_tokens + 1e-5 * work.num_attended
        self.now += seconds
        if output.num_scheduled_tokens:
            self.steps.append(dict(output.num_scheduled_tokens))
            self.seconds.append(seconds)


@pytest.fixture
def run(engine_of: Engines, monkeypatch: pytest.MonkeyPatch) -> Run:
    engine = engine_of("sync-paced")
    assert engine.llm.reset_prefix_cache()
    run = Run(engine)
    scheduler: Any = engine.scheduler
    update = scheduler.update_from_output

    def timed_update(output: Any, *args: Any) -> Any:
        run.take(output, scheduler.requests)
        return update(output, *args)

    monkeypatch.setattr(scheduler, "update_from_output", timed_update)
    monkeypatch.setattr(scheduler, "_pace", Pace(BOUND, MAX_TOKENS, clock=lambda: run.now))
    return run


def streams(num_tokens: int, count: int = 4) -> list[Arrival]:
    return [Arrival(random_prompts((9, 8, 7), seed), greedy(num_tokens)) for seed in range(count)]


def long_prompt(length: int, seed: int = 50, step: int = 0, max_tokens: int = 3) -> Arrival:
    return Arrival(random_prompts((length, length - 40, length - 3), seed), greedy(max_tokens), step=step)


def test_streams_get_a_token_in_every_step_while_a_long_prompt_is_read(run: Run, judge: Judge) -> None:
    prompt = long_prompt(900, step=10)
    names, outputs = run.serve(*streams(80), prompt)
    end = run.first_token(names[-1], 900)
    reading = [step for step in run.steps[:end] if names[-1] in step]
    assert len(reading) > 8
    assert all(step[name] == 1 for step in reading for name in names[:4])
    assert max(run.seconds) <= BOUND
    assert list(outputs[-1].outputs[0].token_ids) == judge.tokens(prompt.prompts, 3)


def test_a_prompt_is_read_in_pieces_when_it_is_alone_too(run: Run) -> None:
    """vLLM has no limit for a lone prompt; whoever comes next would wait for all of it."""
    (name,), _ = run.serve(long_prompt(900))
    assert run.steps[0] == {name: FIRST_CHUNK}
    assert max(run.seconds) <= BOUND
    assert sorted(run.seconds)[len(run.seconds) // 2] > 0.8 * BOUND


def test_every_piece_is_reported_so_that_the_engine_does_not_seem_to_hang(run: Run) -> None:
    run.engine.reports.clear()
    run.serve(long_prompt(900, max_tokens=1))
    assert len(run.engine.reports) == len(run.steps) > 8


def test_of_two_long_prompts_the_first_is_read_as_if_it_were_alone(run: Run, judge: Judge) -> None:
    run.serve(long_prompt(300, seed=60))  # what steps cost is known
    (alone,), _ = run.serve(long_prompt(700, seed=61))
    num_steps = run.first_token(alone, 700)
    arrivals = [long_prompt(700, seed=62), long_prompt(700, seed=63)]
    (first, second), outputs = run.serve(*arrivals)
    assert run.first_token(first, 700) <= num_steps + 1
    assert run.first_token(second, 700) <= 2.2 * num_steps + 2
    assert max(run.seconds) <= BOUND
    for arrival, output in zip(arrivals, outputs, strict=True):
        assert list(output.outputs[0].token_ids) == judge.tokens(arrival.prompts, 3)


def test_a_short_prompt_does_not_wait_for_a_long_one(run: Run) -> None:
    question = Arrival(random_prompts((30, 20, 25), seed=70), greedy(3), step=6)
    (long, short), _ = run.serve(long_prompt(950, seed=71), question)
    assert run.first_token(short, 30) < 12
    assert run.first_token(short, 30) < run.first_token(long, 950) / 2
    assert max(run.seconds) <= BOUND


def test_decodes_that_stand_behind_prompts_get_their_tokens(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A smaller limit of a step's tokens alone would be used up by the prompts before them."""
    scheduler = run.engine.scheduler
    schedule = scheduler.schedule

    def prompts_first(*args: Any) -> Any:
        scheduler.running.sort(key=lambda request: not request.is_prefill_chunk)
        return schedule(*args)

    monkeypatch.setattr(scheduler, "schedule", prompts_first)
    prompts = [long_prompt(400, seed=80, step=5), long_prompt(330, seed=81, step=6), long_prompt(250, seed=82, step=7)]
    names, _ = run.serve(*streams(60), *prompts)
    both = [step for step in run.steps if sum(name in step for name in names[4:]) > 1 and names[0] in step]
    assert len(both) > 3
    assert all(step[name] == 1 for step in both for name in names[:4])
    assert max(run.seconds) <= BOUND


def test_what_the_prefix_cache_has_is_not_counted(run: Run) -> None:
    first, again = long_prompt(900, seed=90), long_prompt(900, seed=90)
    run.serve(first)
    num_steps = len(run.steps)
    _, (output,) = run.serve(again)
    assert output.num_cached_tokens > 800
    assert len(run.steps) < num_steps / 2
    assert max(run.seconds) <= BOUND


def test_a_limit_of_tokens_holds_as_well(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.engine.scheduler, "_pace", Pace(BOUND, 16, clock=lambda: run.now))
    run.serve(*streams(20), long_prompt(300, seed=95, step=3))
    assert max(sum(step.values()) for step in run.steps) == 16


def test_without_prompts_there_is_no_limit(run: Run) -> None:
    run.serve(*streams(12))
    scheduler = run.engine.scheduler
    assert scheduler.max_num_scheduled_tokens == MAX_TOKENS
    assert scheduler.scheduler_config.long_prefill_token_threshold == 0


def test_the_limit_of_a_prompt_leaves_a_decode_its_drafts() -> None:
    decoding, reading = (
        Request(name, list(range(40)), greedy(9), None, arrival_time=0.0) for name in ("decoding", "reading")
    )
    decoding.num_computed_tokens = 40
    decoding.append_output_token_ids(7)
    decoding.spec_token_ids = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    reading.is_prefill_chunk = True
    limits = Pace(BOUND, MAX_TOKENS, num_drafts=10).limits([reading, decoding], None)
    assert limits.num_prompt_tokens == 11
    assert limits.num_tokens >= 11 + 11


def test_without_a_bound_a_prompt_is_read_in_one_piece(engine: InProcessEngine) -> None:
    assert engine.llm.reset_prefix_cache()
    engine.reports.clear()
    engine.generate([long_prompt(900, seed=99, max_tokens=1)])
    assert len(engine.reports) == 1


def test_a_step_that_was_scheduled_ahead_does_not_count_the_one_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    learned: list[float] = []
    monkeypatch.setattr(StepCost, "learn", lambda _, work, num_prompt_tokens, seconds: learned.append(seconds))
    times = iter([0.0, 0.0, 0.0, 1.0, 3.0])  # when it is made, two schedules, two results
    pace = Pace(BOUND, MAX_TOKENS, clock=lambda: next(times))
    request = Request("reading", list(range(40)), greedy(9), None, arrival_time=0.0)
    output = SchedulerOutput.make_empty()
    output.num_scheduled_tokens, output.total_num_scheduled_tokens = {"reading": 8}, 8
    pace.begin(output, {"reading": request})
    pace.begin(output, {"reading": request})
    pace.end(output)
    pace.end(output)
    assert learned == [1.0, 2.0]
