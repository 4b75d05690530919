"""A cached block is shared only when every specialist has the same tokens in it and has computed it."""

from collections.abc import Callable

import pytest

from tests.server.engine.harness import Arrival, InProcessEngine, Prompts, greedy, random_prompts
from tests.server.engine.judge import Judge

Engines = Callable[[str], InProcessEngine]
BLOCK = 32
CONFIGURATIONS = ["sync", "async", "sync-budget-16", "async-budget-16"]


@pytest.fixture(params=CONFIGURATIONS)
def fresh_engine(engine_of: Engines, request: pytest.FixtureRequest) -> InProcessEngine:
    """An engine whose prefix cache is empty."""
    engine = engine_of(request.param)
    assert engine.llm.reset_prefix_cache()
    return engine


def cached_tokens(engine: InProcessEngine, judge: Judge, *arrivals: Arrival) -> list[int]:
    """Serve, compare every request with the reference, and return how many canonical tokens came from the cache."""
    outputs = engine.generate(arrivals)
    for arrival, output in zip(arrivals, outputs, strict=True):
        assert list(output.outputs[0].token_ids) == judge.tokens(arrival.prompts, arrival.params.max_tokens)
    return [output.num_cached_tokens for output in outputs]


def joined(*parts: Prompts) -> Prompts:
    """One prompt per specialist from consecutive parts."""
    return [[token for part in own for token in part] for own in zip(*parts, strict=True)]


def test_a_shared_system_prompt_is_computed_once(fresh_engine: InProcessEngine, judge: Judge) -> None:
    system = random_prompts((70, 66, 75), seed=1)
    first, second = (joined(system, random_prompts((12, 20, 9), seed)) for seed in (2, 3))
    assert cached_tokens(fresh_engine, judge, Arrival(first, greedy(6))) == [0]
    # Shared by all: 66 tokens, two full blocks.
    assert cached_tokens(fresh_engine, judge, Arrival(second, greedy(6))) == [2 * BLOCK]


@pytest.mark.parametrize(("shortest", "num_blocks"), [(65, 2), (64, 1)])
def test_a_hit_is_limited_by_the_shortest_rendering(
    fresh_engine: InProcessEngine, judge: Judge, shortest: int, num_blocks: int
) -> None:
    prompts = random_prompts((130, shortest, 100), seed=4)
    assert cached_tokens(fresh_engine, judge, Arrival(prompts, greedy(1))) == [0]
    # min(l) - 1 tokens can be cached, of 130.
    assert cached_tokens(fresh_engine, judge, Arrival(prompts, greedy(3))) == [num_blocks * BLOCK]


def test_requests_of_one_batch_share_their_prefix(fresh_engine: InProcessEngine, judge: Judge) -> None:
    system = random_prompts((100, 99, 98), seed=5)
    arrivals = [Arrival(joined(system, random_prompts((5, 6, 7), seed)), greedy(6)) for seed in (6, 7, 8)]
    assert sorted(cached_tokens(fresh_engine, judge, *arrivals)) == [0, 3 * BLOCK, 3 * BLOCK]


def test_an_earlier_response_is_reused_in_a_follow_up_turn(fresh_engine: InProcessEngine, judge: Judge) -> None:
    first = random_prompts((40, 33, 45), seed=9)
    (output,) = fresh_engine.generate([Arrival(first, greedy(90))])
    response = list(output.outputs[0].token_ids)
    assert response == judge.tokens(first, 90)
    follow_up = joined(first, [response] * 3, random_prompts((9, 4, 11), seed=10))
    # All specialists share 33 + 90 tokens; the last of them was never computed: 122 // 32 blocks.
    assert cached_tokens(fresh_engine, judge, Arrival(follow_up, greedy(8))) == [3 * BLOCK]


@pytest.mark.parametrize("other", [0, 1], ids=["leader", "follower"])
def test_no_hit_where_one_specialists_tokens_differ(fresh_engine: InProcessEngine, judge: Judge, other: int) -> None:
    first = random_prompts((90, 80, 120), seed=11)
    second = [list(prompt) for prompt in first]
    second[other][40] = (second[other][40] + 1) % 256
    assert second[2] == first[2], "the canonical prompts must be equal for this test to mean anything"
    assert cached_tokens(fresh_engine, judge, Arrival(first, greedy(6))) == [0]
    # Block 0 is equal for all, block 1 is not.
    assert cached_tokens(fresh_engine, judge, Arrival(second, greedy(6))) == [BLOCK]


def test_a_cache_salt_separates_tenants(fresh_engine: InProcessEngine, judge: Judge) -> None:
    prompts = random_prompts((70, 70, 70), seed=12)
    assert cached_tokens(fresh_engine, judge, Arrival(prompts, greedy(3), cache_salt="one")) == [0]
    assert cached_tokens(fresh_engine, judge, Arrival(prompts, greedy(3), cache_salt="two")) == [0]
    assert cached_tokens(fresh_engine, judge, Arrival(prompts, greedy(3), cache_salt="one")) == [2 * BLOCK]
