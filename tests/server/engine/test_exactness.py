"""Greedy output equals the reference token for token, under everything that touches scheduling."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
from vllm.utils.cpu_resource_utils import get_memory_node_info

from tests.server.engine.conftest import CONFIGURATIONS
from tests.server.engine.harness import Arrival, InProcessEngine, greedy, random_prompts
from tests.server.engine.judge import Judge
from ultrafuser.server.engine.core.step_cost import StepCost

Engines = Callable[[str], InProcessEngine]
MAX_TOKENS = 20
LENGTHS = [(13, 16, 36), (100, 20, 7), (1, 1, 60), (50, 50, 50), (5, 90, 33), (64, 1, 2), (40, 33, 31)]
"""Own prompt lengths per request: leader longest, shortest, all equal, and one token against many."""
BATCH = [random_prompts(lengths, seed) for seed, lengths in enumerate(LENGTHS)]


@pytest.mark.parametrize("prompts", BATCH, ids=[str(lengths) for lengths in LENGTHS])
def test_one_request_equals_the_reference(engine: InProcessEngine, judge: Judge, prompts: list[list[int]]) -> None:
    assert engine.tokens([Arrival(prompts, greedy(MAX_TOKENS))]) == [judge.tokens(prompts, MAX_TOKENS)]


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize("steps_apart", [0, 1, 3])
def test_a_batch_with_mixed_arrivals_equals_the_reference(
    engine_of: Engines, judge: Judge, configuration: str, steps_apart: int
) -> None:
    arrivals = [Arrival(prompts, greedy(MAX_TOKENS), step=i * steps_apart) for i, prompts in enumerate(BATCH)]
    expected = [judge.tokens(prompts, MAX_TOKENS) for prompts in BATCH]
    assert engine_of(configuration).tokens(arrivals) == expected


@pytest.mark.parametrize("configuration", [name for name in CONFIGURATIONS if name.startswith("async")])
def test_async_scheduling_was_on(engine_of: Engines, configuration: str) -> None:
    engine = engine_of(configuration)
    assert type(engine.scheduler).__name__ == "FusedAsyncScheduler"
    assert [runner.use_async_scheduling for runner in engine.runner.runners] == [True] * 3
    assert engine.llm.engine_core.engine_core.batch_queue_size == 2


@pytest.mark.parametrize("configuration", [name for name in CONFIGURATIONS if "pressure" in name])
def test_preempted_requests_resume_exactly(
    engine_of: Engines, judge: Judge, configuration: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(configuration)
    if "paced" in configuration:  # a piece or two a step, as the machine has it, would leave too few decodes at a time
        monkeypatch.setattr(StepCost, "chunk", lambda *_: 13)
    preempted: list[tuple[str, int]] = []
    preempt = engine.scheduler._preempt_request

    def spy(request, *args, **kwargs):
        preempted.append((request.request_id, request.num_output_tokens))
        return preempt(request, *args, **kwargs)

    monkeypatch.setattr(engine.scheduler, "_preempt_request", spy)
    batch = [random_prompts(lengths, seed=90 + i) for i, lengths in enumerate([(60, 20, 40), (33, 70, 9)] * 3)]
    tokens = engine.tokens([Arrival(prompts, greedy(60)) for prompts in batch])
    assert any(num_outputs > 0 for _, num_outputs in preempted), "nothing was preempted after its first token"
    assert tokens == [judge.tokens(prompts, 60) for prompts in batch]


@pytest.mark.parametrize("configuration", ["sync-budget-16", "async-budget-16"])
@pytest.mark.parametrize("idle", [0, 1, 2], ids=["leader", "follower-1", "follower-2"])
def test_a_specialist_with_nothing_to_compute_in_a_step(
    engine_of: Engines, judge: Judge, configuration: str, idle: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept over an idle step, a runner's last sampled token would overwrite the last token of a later chunk."""
    engine = engine_of(configuration)
    view, batch = engine.runner._views[idle], engine.runner.runners[idle].input_batch
    idle_steps: list[bool] = [False]
    translate = view.translate

    def spy(output):
        assert not (idle_steps[-1] and batch.prev_req_id_to_index)
        own = translate(output)
        idle_steps.append(bool(output.total_num_scheduled_tokens) and not own.total_num_scheduled_tokens)
        return own

    monkeypatch.setattr(view, "translate", spy)
    lengths = [70, 70, 70]
    lengths[idle] = 3
    short = random_prompts(lengths, seed=200 + idle)
    decoding = random_prompts((9, 9, 9), seed=210)
    # Alone (the whole runner idles) and beside a request that decodes (one row idles).
    assert engine.tokens([Arrival(short, greedy(8))]) == [judge.tokens(short, 8)]
    assert any(idle_steps), "the specialist was never idle"
    tokens = engine.tokens([Arrival(decoding, greedy(20)), Arrival(short, greedy(8), step=2)])
    assert tokens == [judge.tokens(decoding, 20), judge.tokens(short, 8)]


@pytest.mark.parametrize("configuration", ["sync", "async-budget-16", "async-pressure"])
def test_an_abort_leaves_the_others_untouched_and_nothing_behind(
    engine_of: Engines, judge: Judge, configuration: str
) -> None:
    engine = engine_of(configuration)
    arrivals = [Arrival(prompts, greedy(MAX_TOKENS), step=i) for i, prompts in enumerate(BATCH)]
    for leaver, after in [(1, 2), (4, 1), (5, 9)]:
        arrivals[leaver].abort_after = after
    outputs = engine.generate(arrivals)
    stayed = [i for i in range(len(BATCH)) if i not in (1, 4, 5)]
    assert [list(outputs[i].outputs[0].token_ids) for i in stayed] == [
        judge.tokens(BATCH[i], MAX_TOKENS) for i in stayed
    ]
    engine.tokens([Arrival(BATCH[3], greedy(2))])  # the finished ids travel with the next step
    engine.llm.step()
    assert engine.scheduler.get_request_counts() == (0, 0)
    assert engine.scheduler._lags == {}
    assert [view._requests for view in engine.runner._views] == [{}] * 3


def test_a_follow_up_turn_equals_the_reference(engine: InProcessEngine, judge: Judge) -> None:
    first = random_prompts((20, 31, 45), seed=300)
    response = engine.tokens([Arrival(first, greedy(40))])[0]
    glue = random_prompts((7, 3, 12), seed=301)
    follow_up = [prompt + response + own_glue for prompt, own_glue in zip(first, glue, strict=True)]
    assert engine.tokens([Arrival(follow_up, greedy(12))]) == [judge.tokens(follow_up, 12)]


@pytest.mark.parametrize(
    "options",
    [
        {"enable_prefix_caching": False, "enable_chunked_prefill": False, "max_step_seconds": None},
        {
            "block_size": 96,
            "prefix_caching_hash_algo": "sha256_cbor",
            "scheduling_policy": "priority",
            "max_step_seconds": 1e-3,
        },
        {"block_size": 64, "max_num_seqs": 2, "disable_log_stats": True, "logprobs_mode": "processed_logprobs"},
        {"kv_cache_memory_bytes": None, "gpu_memory_utilization": None, "seed": 7, "max_logprobs": -1},
    ],
    ids=lambda options: "-".join(options),
)
def test_every_other_allowed_option_is_exact_too(tiny_fusion: Path, judge: Judge, options: dict[str, Any]) -> None:
    if "gpu_memory_utilization" in options:
        options = {**options, "gpu_memory_utilization": share_with_room_for(2**28)}
    arrivals = [Arrival(prompts, greedy(MAX_TOKENS), step=i) for i, prompts in enumerate(BATCH)]
    with InProcessEngine(tiny_fusion, **options) as engine:
        assert engine.tokens(arrivals) == [judge.tokens(prompts, MAX_TOKENS) for prompts in BATCH]
    assert sum(len(report.weights_TS) for report in engine.reports) == len(BATCH) * MAX_TOKENS


def share_with_room_for(num_bytes: int) -> float:
    """The share of the machine's memory that leaves so many bytes for the cache, beside what this process has now."""
    return float((psutil.Process().memory_info().rss + num_bytes) / get_memory_node_info().total_memory)
