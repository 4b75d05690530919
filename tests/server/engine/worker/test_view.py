"""The schedule as one specialist sees it: pure translation, no engine."""

import random

import pytest
from vllm import SamplingParams
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

from ultrafuser.server.engine.shared.extra_args import SPECIALIST_PROMPTS
from ultrafuser.server.engine.worker.view import SpecialistView, own_span


@pytest.mark.parametrize(
    ("span", "num_canonical", "num_own", "expected"),
    [
        ((0, 36), 36, 13, (0, 13)),  # the whole prompt in one step
        ((0, 16), 36, 13, (0, 12)),  # the last own token waits for the last chunk
        ((16, 32), 36, 13, (12, 12)),  # nothing to compute
        ((32, 36), 36, 13, (12, 13)),  # the last chunk: exactly the last own token
        ((36, 37), 37, 14, (13, 14)),  # a decode step
        ((36, 37), 37, 37, (36, 37)),  # a decode step of the longest
        ((0, 1), 9, 1, (0, 0)),  # a one-token prompt is computed at the very end
    ],
)
def test_own_span(span: tuple[int, int], num_canonical: int, num_own: int, expected: tuple[int, int]) -> None:
    assert own_span(*span, num_canonical, num_own) == expected


def test_any_chunking_computes_every_own_position_once_and_the_last_one_last() -> None:
    rng = random.Random(0)
    for _ in range(500):
        num_canonical = rng.randrange(1, 200)
        num_own = rng.randrange(1, num_canonical + 1)
        start, computed = 0, []
        while start < num_canonical:
            end = min(start + rng.randrange(1, 60), num_canonical)
            own_start, own_end = own_span(start, end, num_canonical, num_own)
            computed.append((own_start, own_end))
            start = end
        positions = [p for own_start, own_end in computed for p in range(own_start, own_end)]
        assert positions == list(range(num_own))
        assert computed[-1][1] == num_own > computed[-1][0]


PROMPTS = [[1, 2, 3], [4] * 40]
PARAMS = SamplingParams(temperature=0.7, seed=3, extra_args={SPECIALIST_PROMPTS: PROMPTS})


def new_request(block_ids: list[int]) -> NewRequestData:
    return NewRequestData("r", list(PROMPTS[1]), [], PARAMS, None, (block_ids,), 0, None)


def step(
    *,
    new: NewRequestData | None = None,
    start: int = 0,
    num_tokens: int = 0,
    num_outputs: int = 0,
    blocks: list[int] | None = None,
    resumed: bool = False,
    all_token_ids: list[int] | None = None,
) -> SchedulerOutput:
    """One step of the scheduler, in which request r gets `num_tokens` tokens (none: it is not scheduled)."""
    output = SchedulerOutput.make_empty()
    if new is not None:
        output.scheduled_new_reqs = [new]
    elif num_tokens:
        output.scheduled_cached_reqs = CachedRequestData(
            req_ids=["r"],
            resumed_req_ids={"r"} if resumed else set(),
            new_token_ids=[],
            all_token_ids={} if all_token_ids is None else {"r": all_token_ids},
            new_block_ids=[None if blocks is None else (blocks,)],
            num_computed_tokens=[start],
            num_output_tokens=[num_outputs],
        )
    if num_tokens:
        output.num_scheduled_tokens = {"r": num_tokens}
        output.total_num_scheduled_tokens = num_tokens
    return output


def test_a_request_is_announced_at_its_first_span_with_its_own_prompt() -> None:
    (announced,) = SpecialistView(0).translate(step(new=new_request([7]), num_tokens=16)).scheduled_new_reqs
    assert announced.prompt_token_ids == [1, 2, 3]
    assert announced.num_computed_tokens == 0
    assert announced.sampling_params is PARAMS


def test_a_follower_samples_neither_seeded_nor_penalised() -> None:
    (announced,) = SpecialistView(1).translate(step(new=new_request([7]), num_tokens=16)).scheduled_new_reqs
    assert announced.sampling_params == SamplingParams(temperature=0.0)


def test_blocks_given_while_a_specialist_is_skipped_reach_it_with_its_next_span() -> None:
    view = SpecialistView(0)
    assert view.translate(step(new=new_request([7]), num_tokens=16)).num_scheduled_tokens == {"r": 2}
    skipped = view.translate(step(start=16, num_tokens=16, blocks=[8]))
    assert skipped.num_scheduled_tokens == {}
    assert skipped.scheduled_cached_reqs.req_ids == []
    last = view.translate(step(start=32, num_tokens=8, blocks=[9]))
    assert last.num_scheduled_tokens == {"r": 1}
    assert last.scheduled_cached_reqs.num_computed_tokens == [2]
    assert last.scheduled_cached_reqs.new_block_ids == [([8, 9],)]
    assert last.scheduled_cached_reqs.resumed_req_ids == set()


def test_a_request_skipped_at_first_is_announced_later_with_all_its_blocks() -> None:
    view = SpecialistView(0)
    params = SamplingParams(extra_args={SPECIALIST_PROMPTS: [[1], [4] * 40]})
    new = NewRequestData("r", [4] * 40, [], params, None, ([7],), 0, None)
    assert view.translate(step(new=new, num_tokens=16)).scheduled_new_reqs == []
    assert view.translate(step(start=16, num_tokens=16, blocks=[8])).scheduled_new_reqs == []
    (announced,) = view.translate(step(start=32, num_tokens=8, blocks=[9])).scheduled_new_reqs
    assert announced.block_ids == ([7, 8, 9],)
    assert announced.prompt_token_ids == [1]


def test_a_resumed_request_gets_its_whole_new_block_list_once() -> None:
    view = SpecialistView(0)
    view.translate(step(new=new_request([7, 8]), num_tokens=40))
    view.translate(step())  # preempted
    outputs = [50, 51]
    resumed = step(num_tokens=16, num_outputs=2, blocks=[3], resumed=True, all_token_ids=PROMPTS[1] + outputs)
    first = view.translate(resumed).scheduled_cached_reqs
    assert (first.resumed_req_ids, first.new_block_ids) == ({"r"}, [([3],)])
    assert first.all_token_ids == {"r": [1, 2, 3, *outputs]}
    assert view.translate(step(start=16, num_tokens=16, num_outputs=2, blocks=[4])).num_scheduled_tokens == {}
    again = view.translate(step(start=32, num_tokens=10, num_outputs=2, blocks=[5])).scheduled_cached_reqs
    assert (again.resumed_req_ids, again.new_block_ids) == (set(), [([4, 5],)])
    # Announced again in a step whose plan carries no token ids: own prompt and the outputs of the resume step.
    assert again.all_token_ids == {"r": [1, 2, 3, *outputs]}
    assert again.num_computed_tokens == [4]


def test_a_resume_whose_first_span_is_empty_is_remembered() -> None:
    view = SpecialistView(0)
    view.translate(step(new=new_request([7]), num_tokens=16))
    view.translate(step())
    # Resumed with 30 tokens cached: this specialist has them all and waits for the last chunk.
    assert view.translate(step(start=8, num_tokens=8, blocks=[3], resumed=True)).num_scheduled_tokens == {}
    last = view.translate(step(start=16, num_tokens=24, blocks=[4])).scheduled_cached_reqs
    assert (last.resumed_req_ids, last.new_block_ids) == ({"r"}, [([3, 4],)])


def test_every_output_has_lists_of_its_own() -> None:
    """The runner extends `block_ids` in place; shared with the view, blocks would be told twice."""
    view, blocks = SpecialistView(0), [7]
    (announced,) = view.translate(step(new=new_request(blocks), num_tokens=40)).scheduled_new_reqs
    announced.block_ids[0].append(99)
    assert announced.prompt_token_ids is not None
    announced.prompt_token_ids.append(99)
    told = view.translate(step(start=40, num_tokens=1, num_outputs=1, blocks=[8])).scheduled_cached_reqs
    told.new_block_ids[0][0].append(98)
    request = view._requests["r"]
    assert (blocks, request.block_ids, request.own_prompt) == ([7], ([7, 8],), [1, 2, 3])


def test_a_finished_request_is_forgotten_and_reported() -> None:
    view = SpecialistView(0)
    view.translate(step(new=new_request([7]), num_tokens=16))
    output = step()
    output.finished_req_ids = {"r"}
    assert view.translate(output).finished_req_ids == {"r"}
    assert view._requests == {}
