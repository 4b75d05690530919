"""Thoughts in the engine: a budget ends them, a grammar waits for their end, whatever else a step does."""

from collections.abc import Callable
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from tests.fakes import EOS_ID
from tests.server.engine.harness import Arrival, InProcessEngine, Prompts, greedy, random_prompts
from tests.server.engine.judge import Judge
from ultrafuser.server.engine.shared.thought import THOUGHT, Opening, Thought

LENGTHS = [(13, 16, 36), (100, 20, 7), (50, 50, 50), (5, 90, 33)]
BATCH = [random_prompts(lengths, seed) for seed, lengths in enumerate(LENGTHS)]
NUM_TOKENS = 30
START, END = 300, 301
"""Ids that random models hardly ever choose."""

CONFIGURATIONS = ["sync", "async", "async-pressure-budget-16", "speculation", "drafts", "drafts-pressure"]


def thinking(opening: Opening, end: int = END, budget: int | None = None, implicit: tuple[int, ...] = ()) -> Any:
    """What goes with such a request."""
    return {THOUGHT: Thought(opening, START, end, implicit, budget).as_plain()}


def cut_at(budget: int, prompts: Prompts, judge: Judge, end: int = END) -> list[int]:
    """What the reference says if it may think so many tokens."""
    free = judge.tokens(prompts, NUM_TOKENS)
    if end in free[: budget + 1]:
        return free
    before = [*free[:budget], end]
    if len(before) == NUM_TOKENS:
        return before
    rest = judge.tokens([[*prompt, *before] for prompt in prompts], NUM_TOKENS - len(before))
    return [*before, *rest]


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_a_budget_ends_the_thought_and_changes_nothing_else(
    engine_of: Callable[[str], InProcessEngine], judge: Judge, configuration: str
) -> None:
    budgets = [0, 1, 7, NUM_TOKENS - 1]
    arrivals = [
        Arrival(prompts, greedy(NUM_TOKENS, extra_args=thinking("open", budget=budget)), step=index)
        for index, (prompts, budget) in enumerate(zip(BATCH, budgets, strict=True))
    ]
    wanted = [cut_at(budget, prompts, judge) for prompts, budget in zip(BATCH, budgets, strict=True)]
    assert engine_of(configuration).tokens(arrivals) == wanted


@pytest.mark.parametrize("configuration", ["sync", "drafts"])
@pytest.mark.parametrize("place", [3, 4, 5])
def test_a_thought_that_ended_by_itself_is_not_ended_again(
    engine_of: Callable[[str], InProcessEngine], judge: Judge, configuration: str, place: int
) -> None:
    free = judge.tokens(BATCH[0], NUM_TOKENS)
    end = free[place]
    budget = free.index(end)  # the end marker comes as the budget is spent
    for allowed in (budget, budget + 5):
        params = greedy(NUM_TOKENS, extra_args=thinking("open", end, allowed))
        assert engine_of(configuration).tokens([Arrival(BATCH[0], params)]) == [free]


@pytest.mark.parametrize("opening", ["unopened", "closed"])
def test_where_nothing_is_thought_there_is_nothing_to_end(
    engine_of: Callable[[str], InProcessEngine], judge: Judge, opening: Opening
) -> None:
    params = greedy(NUM_TOKENS, extra_args=thinking(opening, budget=0))
    assert engine_of("drafts").tokens([Arrival(BATCH[1], params)]) == [judge.tokens(BATCH[1], NUM_TOKENS)]


def test_a_thought_that_the_model_opens_has_the_same_budget(
    engine_of: Callable[[str], InProcessEngine], judge: Judge
) -> None:
    free = judge.tokens(BATCH[1], NUM_TOKENS)
    thought = Thought("unopened", free[0], END, (), 2)
    before = [*free[:3], END]
    rest = judge.tokens([[*prompt, *before] for prompt in BATCH[1]], NUM_TOKENS - len(before))
    params = greedy(NUM_TOKENS, extra_args={THOUGHT: thought.as_plain()})
    assert engine_of("drafts").tokens([Arrival(BATCH[1], params)]) == [[*before, *rest]]


def test_a_call_ends_the_thought_for_the_budget_too(engine_of: Callable[[str], InProcessEngine], judge: Judge) -> None:
    free = judge.tokens(BATCH[0], NUM_TOKENS)
    params = greedy(NUM_TOKENS, extra_args=thinking("open", budget=6, implicit=(free[4],)))
    assert engine_of("drafts").tokens([Arrival(BATCH[0], params)]) == [free]


def constrained(opening: Opening, budget: int | None = None, **options: Any) -> SamplingParams:
    """A request whose answer is one of two words."""
    return SamplingParams(
        temperature=0.0,
        max_tokens=40,
        structured_outputs=StructuredOutputsParams(choice=["yes", "no"]),
        extra_args=thinking(opening, budget=budget),
        **options,
    )


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_a_grammar_begins_where_the_thought_ends(
    engine_of: Callable[[str], InProcessEngine], judge: Judge, configuration: str
) -> None:
    engine = engine_of(configuration)
    budgets = [0, 1, 7, 20]
    arrivals = [
        Arrival(prompts, constrained("open", budget), step=index)
        for index, (prompts, budget) in enumerate(zip(BATCH, budgets, strict=True))
    ]
    tokenizer = engine.llm.renderer.get_tokenizer()
    for token_ids, prompts, budget in zip(engine.tokens(arrivals), BATCH, budgets, strict=True):
        free = judge.tokens(prompts, NUM_TOKENS, logit_bias={EOS_ID: -100.0})
        assert token_ids[: budget + 1] == [*free[:budget], END]
        assert tokenizer.decode(token_ids[budget + 1 :], skip_special_tokens=True) in ("yes", "no")


@pytest.mark.parametrize("opening", ["unopened", "closed"])
def test_a_grammar_holds_from_the_first_token_where_nothing_is_thought(
    engine_of: Callable[[str], InProcessEngine], opening: Opening
) -> None:
    engine = engine_of("drafts")
    (output,) = engine.generate([Arrival(BATCH[0], constrained(opening))])
    assert output.outputs[0].text in ("yes", "no")


def test_a_model_may_think_before_its_grammar(engine_of: Callable[[str], InProcessEngine]) -> None:
    engine = engine_of("drafts")
    params = constrained("unopened", 3, logit_bias={START: 100.0})
    (output,) = engine.generate([Arrival(BATCH[0], params)])
    token_ids = list(output.outputs[0].token_ids)
    assert token_ids[0] == START
    assert token_ids[4] == END
    tokenizer = engine.llm.renderer.get_tokenizer()
    assert tokenizer.decode(token_ids[5:], skip_special_tokens=True) in ("yes", "no")
    closed = constrained("closed", 3, logit_bias={START: 100.0})
    (output,) = engine.generate([Arrival(BATCH[0], closed)])
    assert output.outputs[0].text in ("yes", "no")
