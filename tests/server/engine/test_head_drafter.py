"""A trained head drafts: tokens are the reference's, and what it remembers of a response is true and bounded."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.draft_heads import write_random_head, write_trained_head
from tests.server.engine.conftest import BUDGET_16, PRESSURE
from tests.server.engine.harness import Arrival, InProcessEngine, Noisy, greedy
from tests.server.engine.judge import Judge
from tests.server.engine.test_speculation import BATCH, NUM_TOKENS, serve
from ultrafuser.server.engine.worker.head_drafter import NOTHING, HeadDrafter
from ultrafuser.server.engine.worker.lookahead import Ahead

CONFIGURATIONS: dict[str, dict[str, Any]] = {"normal": {}, "budget-16": BUDGET_16, "pressure": PRESSURE}


@pytest.fixture(scope="module")
def heads(tiny_fusion: Path, judge: Judge, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a random head, and of one that has learnt the answers."""
    folder = tmp_path_factory.mktemp("heads")
    answers = [(prompts, judge.tokens(prompts, NUM_TOKENS)) for prompts in BATCH]
    return {
        "random": write_random_head(tiny_fusion, folder / "random"),
        "trained": write_trained_head(tiny_fusion, judge.model, answers, folder / "trained"),
    }


@pytest.fixture(scope="module")
def engine_with(
    tiny_fusion: Path, heads: dict[str, Path], shared_groups: None
) -> Iterator[Callable[[str, str], InProcessEngine]]:
    """The tiny fusion's engine with a head, in a configuration; four drafts a request in every step."""
    engines: dict[tuple[str, str], InProcessEngine] = {}

    def get(head: str, configuration: str) -> InProcessEngine:
        if (head, configuration) not in engines:
            speculation = {"drafter": "head", "path": str(heads[head]), "min_tokens": 4, "max_tokens": 4}
            engine = InProcessEngine(tiny_fusion, speculation=speculation, **CONFIGURATIONS[configuration])
            engines[head, configuration] = stack.enter_context(engine)
        return engines[head, configuration]

    with ExitStack() as stack:
        yield get


class Watched:
    """The engine's own head; looks before every proposal at what it knows of each request."""

    def __init__(self, engine: InProcessEngine) -> None:
        assert isinstance(engine.drafter, HeadDrafter)
        self.head = engine.drafter
        self._requests = engine.runner.leader.requests
        self.first_seen: dict[str, int] = {}
        """The first position that the head was shown of each request."""

    def propose(self, plan: Mapping[str, Ahead]) -> dict[str, list[int]]:
        """As the head."""
        head, window = self.head, self.head._head.config.window
        assert head.num_free_rings == len(head._positions_RC) - len(head._rings)
        for request in plan:
            outputs = self._requests[request].output_token_ids
            last = head._latest[request]
            assert (last.position, last.token_id) == (len(outputs) - 1, outputs[-1])
            positions = head._positions_RC[head._rings[request]]
            seen = sorted(own for own in positions.tolist() if NOTHING < own <= last.position)
            first = self.first_seen.setdefault(request, seen[0])
            if seen[0] > first and seen[-1] - seen[0] < window - 1:
                first = self.first_seen[request] = seen[0]  # preempted, and shown the rest alone
            assert seen[-window:] == list(range(max(first, last.position - window + 1), last.position + 1))
        return head.propose(plan)


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize("head", ["random", "trained"])
def test_tokens_are_the_references_and_the_head_knows_each_response(
    engine_with: Callable[[str, str], InProcessEngine], judge: Judge, head: str, configuration: str
) -> None:
    engine = engine_with(head, configuration)
    watched = Watched(engine)
    for apart in (0, 1, 3):
        arrivals = [Arrival(own, greedy(NUM_TOKENS), step=index * apart) for index, own in enumerate(BATCH)]
        outputs, num_steps = serve(engine, watched, arrivals)
        assert [list(own.outputs[0].token_ids) for own in outputs] == [judge.tokens(own, NUM_TOKENS) for own in BATCH]
        if head == "trained" and configuration == "normal" and apart == 0:
            assert num_steps < NUM_TOKENS / 2, "what it has learnt is what the engine lets it see"
    is_resumed = any(first > 0 for first in watched.first_seen.values())
    assert is_resumed == (configuration == "pressure")


def test_a_second_turn_that_finds_its_prompt_in_the_cache_begins_its_response_anew(
    engine_with: Callable[[str, str], InProcessEngine], judge: Judge
) -> None:
    engine = engine_with("trained", "normal")
    first = judge.tokens(BATCH[2], NUM_TOKENS)
    prompts = [[*own, *first] for own in BATCH[2]]
    watched = Watched(engine)
    serve(engine, watched, [Arrival(BATCH[2], greedy(NUM_TOKENS))])
    ((output,), _) = serve(engine, watched, [Arrival(prompts, greedy(24))])
    assert output.num_cached_tokens >= 32
    assert list(output.outputs[0].token_ids) == judge.tokens(prompts, 24)
    assert set(watched.first_seen.values()) == {0}


def test_wrong_drafts_do_not_wear_the_memory_of_a_response_out(
    engine_with: Callable[[str, str], InProcessEngine], judge: Judge
) -> None:
    """Through some hundred rounds, most of them with a draft that does not hold."""
    engine = engine_with("trained", "normal")
    noisy = Noisy(Watched(engine))
    prompts = BATCH[0]
    ((output,), num_steps) = serve(engine, noisy, [Arrival(prompts, greedy(400))])
    assert list(output.outputs[0].token_ids) == judge.tokens(prompts, 400)
    assert num_steps > 100


def test_how_far_the_head_goes_is_decided_by_what_it_costs_for_all_requests_together(
    tiny_fusion: Path, heads: dict[str, Path], judge: Judge
) -> None:
    speculation = {"drafter": "head", "path": str(heads["trained"]), "max_tokens": 4}
    with InProcessEngine(tiny_fusion, speculation=speculation) as engine:
        plans: list[dict[str, Ahead]] = []

        class Noted(Watched):
            def propose(self, plan: Mapping[str, Ahead]) -> dict[str, list[int]]:
                if plan:
                    plans.append(dict(plan))
                return super().propose(plan)

        outputs, _ = serve(engine, Noted(engine), [Arrival(own, greedy(NUM_TOKENS)) for own in BATCH])
        assert engine.runner.speculation is not None
        lookahead = engine.runner.speculation.lookahead
    assert [list(own.outputs[0].token_ids) for own in outputs] == [judge.tokens(own, NUM_TOKENS) for own in BATCH]
    assert any(len(plan) == len(BATCH) for plan in plans)
    assert all(len(set(plan.values())) == 1 for plan in plans), "one drafter, and one length, for all"
    assert lookahead.draft_pass.num_samples == sum(any(own.num_tokens for own in plan.values()) for plan in plans)


@pytest.mark.slow
def test_two_ranks_draft_with_one_head_each(tiny_fusion: Path, heads: dict[str, Path], judge: Judge) -> None:
    """Each holds all of it; embeddings are gathered from both."""
    speculation = {"drafter": "head", "path": str(heads["trained"]), "min_tokens": 4, "max_tokens": 4}
    options: dict[str, Any] = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp", "max_num_seqs": 8}
    with InProcessEngine(tiny_fusion, speculation=speculation, **options) as engine:
        tokens = engine.tokens([Arrival(own, greedy(NUM_TOKENS), step=index) for index, own in enumerate(BATCH)])
        num_steps = len(engine.reports)
    assert tokens == [judge.tokens(own, NUM_TOKENS) for own in BATCH]
    assert num_steps < NUM_TOKENS / 2 + len(BATCH), "both ranks know what the head has learnt"


def test_a_request_that_is_aborted_leaves_its_ring(
    engine_with: Callable[[str, str], InProcessEngine], judge: Judge
) -> None:
    engine = engine_with("trained", "normal")
    head = Watched(engine).head
    arrivals = [
        Arrival(own, greedy(NUM_TOKENS), abort_after=4 if index % 2 else None) for index, own in enumerate(BATCH)
    ]
    outputs = engine.generate(arrivals)
    assert [list(own.outputs[0].token_ids) for own in outputs[::2]] == [
        judge.tokens(own, NUM_TOKENS) for own in BATCH[::2]
    ]
    engine.generate([Arrival(BATCH[0], greedy(3))])
    (kept,) = head._rings.values()
    assert (head._positions_RC[[index for index in range(len(head._positions_RC)) if index != kept]] == NOTHING).all()


def test_what_is_no_number_ends_with_its_request(
    engine_with: Callable[[str, str], InProcessEngine], judge: Judge
) -> None:
    """A ring's next owner does not look at what was in it, but would have added zero times NaN."""
    engine = engine_with("trained", "normal")
    head = Watched(engine).head
    engine.generate([Arrival(BATCH[0], greedy(3))])
    (ring,) = head._rings.values()
    head._values_RCKE[ring] = float("nan")
    head._keys_RCKE[ring] = float("nan")
    head.forget_all_but({})
    assert head._free[-1] == ring, "it is the next that is given away"
    outputs, num_steps = serve(engine, head, [Arrival(own, greedy(NUM_TOKENS)) for own in BATCH])
    assert [list(own.outputs[0].token_ids) for own in outputs] == [judge.tokens(own, NUM_TOKENS) for own in BATCH]
    assert num_steps < NUM_TOKENS / 2


def test_the_rehearsal_of_a_full_step_leaves_no_trace(
    engine_with: Callable[[str, str], InProcessEngine], judge: Judge
) -> None:
    engine = engine_with("trained", "normal")
    head = Watched(engine).head
    head.forget_all_but({})
    with torch.inference_mode():
        engine.runner.profile_run()
    assert (head._positions_RC == NOTHING).all()
    outputs, num_steps = serve(engine, head, [Arrival(BATCH[1], greedy(NUM_TOKENS))])
    assert list(outputs[0].outputs[0].token_ids) == judge.tokens(BATCH[1], NUM_TOKENS)
    assert num_steps < NUM_TOKENS / 2


def test_what_the_head_takes_stands_in_the_memory_profile(
    engine_with: Callable[[str, str], InProcessEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_with("random", "normal")
    runner, head = engine.runner, engine.drafter
    assert isinstance(head, HeadDrafter)
    for own in runner.runners:
        monkeypatch.setattr(own, "model_memory_usage", 1000, raising=False)
    assert runner.model_memory_usage == 3000 + head.num_bytes
    keys_and_values = 2 * runner.leader.scheduler_config.max_num_seqs * (24 + 4) * 32 * 4
    assert keys_and_values < head.num_bytes < 2 * keys_and_values
