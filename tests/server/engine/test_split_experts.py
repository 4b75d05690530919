"""Mixtures of experts on ranks of their own, whose groups vLLM makes by the leader's configuration."""

from pathlib import Path
from typing import Any

import pytest

from tests import families
from tests.server.engine.harness import Arrival, InProcessEngine, greedy
from tests.server.engine.judge import Judge
from tests.server.engine.test_experts import BATCH, FUSIONS, MAX_TOKENS
from ultrafuser.gating.model.fusion import load_fusion
from ultrafuser.gating.model.reference import UltraFuserForCausalLM

SPLIT: dict[str, Any] = {"placement": "split", "max_num_batched_tokens": 16, "max_num_seqs": 8}


@pytest.fixture(scope="module", params=FUSIONS)
def mixed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Judge]:
    """Two specialists, one of them a mixture of experts, and their reference."""
    path = families.write_fusion(tmp_path_factory.mktemp("mixed"), FUSIONS[request.param])
    return path, Judge(UltraFuserForCausalLM.from_fusion(load_fusion(path)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"tensor_parallel_size": 2}, marks=pytest.mark.long),
        pytest.param({"tensor_parallel_size": 2, "exchange": "hidden"}, marks=pytest.mark.long),
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "logits",
)
def test_experts_lead_and_follow(mixed: tuple[Path, Judge], options: dict[str, Any]) -> None:
    path, judge = mixed
    arrivals = [Arrival(prompts, greedy(MAX_TOKENS), step=2 * i) for i, prompts in enumerate(BATCH)]
    with InProcessEngine(path, **(SPLIT | options)) as engine:
        assert engine.tokens(arrivals) == [judge.tokens(prompts, MAX_TOKENS) for prompts in BATCH]
