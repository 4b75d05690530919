"""The Transformers baseline does the same work as the engine: the same greedy tokens, in every way it can be run."""

from pathlib import Path
from typing import cast

import pytest

from benchmarks.engines import ContinuousBatching, StepEngine, fused_engine
from benchmarks.lockstep import CacheKind, LockstepLoop, StaticBatches
from benchmarks.workload import Request, random_requests
from tests.fakes import write_tiny_fusion
from ultrafuser.gating.model.fusion import FusedModelInfo, FusionConfig, inspect_fusion, load_fusion
from ultrafuser.gating.model.reference import UltraFuserForCausalLM

NUM_TOKENS = 24


@pytest.fixture(scope="module")
def fusion(tmp_path_factory: pytest.TempPathFactory) -> FusionConfig:
    return load_fusion(write_tiny_fusion(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def info(fusion: FusionConfig) -> FusedModelInfo:
    return inspect_fusion(fusion)


@pytest.fixture(scope="module")
def engine(fusion: FusionConfig) -> StepEngine:
    return fused_engine(fusion)


@pytest.fixture
def requests(info: FusedModelInfo) -> list[Request]:
    """Requests whose prompts differ in length, between requests and between specialists."""
    equal = random_requests(info, [40, 23, 31], [NUM_TOKENS] * 3, seed=3)
    return [Request([own[index:] for index, own in enumerate(r.prompts)], r.num_tokens) for r in equal]


@pytest.mark.parametrize("cache_kind", ["dynamic", "static"])
def test_the_loop_generates_the_tokens_of_the_engine(
    cache_kind: str, fusion: FusionConfig, info: FusedModelInfo, engine: StepEngine, requests: list[Request]
) -> None:
    loop = LockstepLoop(fusion, info, cast(CacheKind, cache_kind))
    loop.start(requests)
    while loop.num_steps < NUM_TOKENS:
        loop.step()
    expected = engine.finish(requests)
    assert loop.token_ids == expected
    assert len({tuple(token_ids) for token_ids in expected}) == len(requests), "the responses should differ"


@pytest.mark.parametrize("kind", ["smoothed", "joint+probabilities+scaled+smoothed"])
def test_the_loop_follows_the_reference_with_other_kinds_of_gate(
    kind: str, tmp_path: Path, requests: list[Request]
) -> None:
    fusion = load_fusion(write_tiny_fusion(tmp_path, gate=kind))
    model = UltraFuserForCausalLM.from_fusion(fusion)
    loop = LockstepLoop(fusion, inspect_fusion(fusion))
    for _ in range(2):
        loop.start(requests)
        while loop.num_steps < NUM_TOKENS:
            loop.step()
        wanted = model.respond([request.prompts for request in requests], max_new_tokens=NUM_TOKENS, use_cache=True)
        assert loop.token_ids == [generation.token_ids for generation in wanted]
        loop.stop()


def test_prompts_of_equal_length_need_no_mask_and_give_the_same_tokens(
    fusion: FusionConfig, info: FusedModelInfo, engine: StepEngine
) -> None:
    requests = random_requests(info, [20, 20], [NUM_TOKENS] * 2, seed=4)
    loop = LockstepLoop(fusion, info)
    loop.start(requests)
    assert all(context.mask_BT is None for context in loop._contexts)
    while loop.num_steps < NUM_TOKENS:
        loop.step()
    assert loop.token_ids == engine.finish(requests)


def test_static_batches_run_until_the_longest_response_and_count_only_wanted_tokens(
    fusion: FusionConfig, info: FusedModelInfo
) -> None:
    requests = random_requests(info, [8] * 4, [2, 5, 3, 1], seed=5)
    work = StaticBatches(LockstepLoop(fusion, info), requests, batch_size=2)
    shares = []
    while work.progress < 1:
        work.step()
        shares.append(round(work.progress * 11))
    assert shares == [2, 4, 5, 6, 7, 9, 10, 11]


def test_continuous_batching_fills_its_slots_and_gives_the_tokens_of_each_request_alone(
    engine: StepEngine, info: FusedModelInfo
) -> None:
    requests = random_requests(info, [8, 12, 9, 10], [2, 6, 3, 4], seed=6)
    work = ContinuousBatching(engine, requests, num_slots=2)
    while work.progress < 1:
        work.step()
        unfinished = [ids for ids, r in zip(engine.token_ids, requests, strict=False) if len(ids) < r.num_tokens]
        assert len(unfinished) <= 2
    together = engine.token_ids
    assert together == [engine.finish([request])[0] for request in requests]


def test_stopping_an_engine_leaves_nothing_running(engine: StepEngine, info: FusedModelInfo) -> None:
    engine.start(random_requests(info, [8, 8], [100, 100], seed=7))
    engine.stop()
    assert engine.step() == 0
    assert engine.finish(random_requests(info, [8], [3], seed=8))[0] != []
