"""Mixtures of experts beside models without: whoever leads, and though a router's near tie would ask another expert."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.distributed import parallel_state

from tests import families
from tests.server.engine.conftest import BUDGET_16, DRAFTS
from tests.server.engine.harness import Arrival, InProcessEngine, Noisy, greedy, random_prompts
from tests.server.engine.judge import MIN_ROUTER_GAP, Judge, router_gap
from ultrafuser.gating.model.fusion import load_fusion
from ultrafuser.gating.model.reference import UltraFuserForCausalLM

MAX_TOKENS = 20
BATCH = [random_prompts(lengths, seed) for seed, lengths in enumerate([(13, 36), (60, 7), (5, 44), (40, 40)])]
FUSIONS = {
    "follower": {"text": families.llama(), "code": families.qwen3_moe()},
    "leader": {"text": families.qwen3_moe(), "code": families.mistral()},
}
"""By the place of the specialist with experts."""


@pytest.fixture(scope="module", params=FUSIONS)
def fusion(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    return families.write_fusion(tmp_path_factory.mktemp("experts"), FUSIONS[request.param])


@pytest.fixture(scope="module")
def judge(fusion: Path) -> Judge:
    return Judge(UltraFuserForCausalLM.from_fusion(load_fusion(fusion)))


@pytest.fixture(scope="module")
def engine(fusion: Path) -> Iterator[InProcessEngine]:
    """Prompts in chunks, drafts that are often wrong; as in a process of its own, where no other model had experts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel_state, "_EP", None)
        with InProcessEngine(fusion, **(DRAFTS | BUDGET_16)) as engine:
            engine.drafter = Noisy(engine.drafter)
            yield engine


def test_experts_beside_a_model_without_equal_the_reference(engine: InProcessEngine, judge: Judge) -> None:
    arrivals = [Arrival(prompts, greedy(MAX_TOKENS), step=index) for index, prompts in enumerate(BATCH)]
    assert engine.tokens(arrivals) == [judge.tokens(prompts, MAX_TOKENS) for prompts in BATCH]


def test_the_judge_refuses_a_request_whose_router_is_undecided(judge: Judge) -> None:
    """Two programs may then ask different experts, and no token tells that either is wrong."""
    specialists: Any = judge.model.specialists
    (model,) = [own for own in specialists if hasattr(own.config, "num_experts_per_tok")]
    prompt = BATCH[0][0]
    assert router_gap(model, prompt) > MIN_ROUTER_GAP
    router = model.base_model.layers[0].mlp.gate
    undecided = Judge(judge.model)
    before = router.weight.clone()
    with torch.no_grad():
        router.weight.zero_()
        with pytest.raises(AssertionError, match=r"a router is undecided by 0\.0$"):
            undecided.tokens(BATCH[0], MAX_TOKENS)
        router.weight.copy_(before)


@pytest.mark.long
def test_two_ranks_hold_half_of_each_expert_and_equal_the_reference(fusion: Path, judge: Judge) -> None:
    options: dict[str, Any] = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp", **BUDGET_16}
    with InProcessEngine(fusion, **options) as engine:
        tokens = engine.tokens([Arrival(prompts, greedy(MAX_TOKENS)) for prompts in BATCH])
    assert tokens == [judge.tokens(prompts, MAX_TOKENS) for prompts in BATCH]
