"""GPT-OSS: attention sinks in layers that slide and in full ones, experts with biases; leading and following."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm.sampling_params import StructuredOutputsParams

from tests import families
from tests.server.engine.conftest import BUDGET_16
from tests.server.engine.harness import Arrival, InProcessEngine, greedy, random_prompts
from tests.server.engine.judge import Judge
from ultrafuser.gating.model.fusion import load_fusion
from ultrafuser.gating.model.reference import UltraFuserForCausalLM

MAX_TOKENS = 20
SMALL: dict[str, Any] = BUDGET_16
BATCH = [random_prompts(lengths, seed) for seed, lengths in enumerate([(13, 36), (110, 7), (5, 120), (40, 40)])]


@pytest.fixture(scope="module", params=["leader", "follower"])
def fusion(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Beside a model that has none of it."""
    models = [("text", families.gpt_oss(16)), ("code", families.llama())]
    ordered = dict(models if request.param == "leader" else reversed(models))
    return families.write_fusion(tmp_path_factory.mktemp("gpt-oss"), ordered, seed=3)


@pytest.fixture(scope="module")
def judge(fusion: Path) -> Judge:
    return Judge(UltraFuserForCausalLM.from_fusion(load_fusion(fusion)))


@pytest.fixture(scope="module")
def engine(fusion: Path) -> Iterator[InProcessEngine]:
    with InProcessEngine(fusion, **SMALL) as engine:
        yield engine


def test_one_long_request_alone_equals_the_reference(engine: InProcessEngine, judge: Judge) -> None:
    """On several cores vLLM shares its keys out, and lost the sink with a part that no window reaches."""
    for prompts in BATCH[1:3]:
        assert engine.tokens([Arrival(prompts, greedy(MAX_TOKENS))]) == [judge.tokens(prompts, MAX_TOKENS)]


def test_a_batch_equals_the_reference(engine: InProcessEngine, judge: Judge) -> None:
    arrivals = [Arrival(prompts, greedy(MAX_TOKENS), step=index) for index, prompts in enumerate(BATCH)]
    assert engine.tokens(arrivals) == [judge.tokens(prompts, MAX_TOKENS) for prompts in BATCH]


def test_a_constraint_holds_from_the_first_token(engine: InProcessEngine) -> None:
    """If GPT-OSS leads, vLLM has its thoughts parsed, and may come to wait for their end; now it waits for none."""
    choice = StructuredOutputsParams(choice=["yes", "no"])
    (output,) = engine.generate([Arrival(BATCH[0], greedy(8, ignore_eos=False, structured_outputs=choice))])
    assert output.outputs[0].text in ("yes", "no")
