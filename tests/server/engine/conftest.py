"""Engines and references shared by the engine tests: one engine per configuration, started when first asked for."""

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from vllm.config import StructuredOutputsConfig

from tests.fakes import write_tiny_fusion
from tests.server.engine.forked_ranks import forked_ranks
from tests.server.engine.harness import InProcessEngine, Noisy
from tests.server.engine.judge import Judge
from ultrafuser.gating.model.fusion import load_fusion
from ultrafuser.gating.model.reference import UltraFuserForCausalLM

BUDGET_16 = {"max_num_batched_tokens": 16, "max_num_seqs": 8}
"""A prefill budget that cuts every prompt into chunks."""
PRESSURE = {"num_gpu_blocks_override": 13, "max_model_len": 256}
"""13 blocks of 32 tokens: too few for the batches of these tests, so requests are preempted."""
PACED = {"max_step_seconds": 1e-3}
"""A bound that no step can keep: prompts are read in many small pieces, whose sizes depend on the machine."""

GRAMMAR = {"structured_outputs_config": StructuredOutputsConfig(backend="xgrammar", disable_any_whitespace=True)}
"""A random model that may put white space between JSON tokens never comes to an end."""

DRAFTS: dict[str, Any] = {"speculation": {"drafter": "leading", "min_tokens": 4, "max_tokens": 4}}
"""Up to four drafts a request in every step, some of them wrong."""

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "sync": {},
    "async": {"force_async": True},
    "sync-budget-16": BUDGET_16,
    "async-budget-16": {"force_async": True, **BUDGET_16},
    "sync-pressure": PRESSURE,
    "async-pressure": {"force_async": True, **PRESSURE},
    "async-pressure-budget-16": {"force_async": True, **PRESSURE, **BUDGET_16},
    "sync-paced": PACED,
    "async-pressure-paced": {"force_async": True, **PRESSURE, **PACED},
    "speculation": {"speculation": {}},
    "drafts": DRAFTS,
    "drafts-budget-16": {**DRAFTS, **BUDGET_16},
    "drafts-pressure": {**DRAFTS, **PRESSURE},
}

SPLIT: dict[str, dict[str, Any]] = {
    "split": {"placement": "split", **BUDGET_16},
    "split-async-pressure": {"placement": "split", "force_async": True, **PRESSURE, **BUDGET_16},
    "split-hidden-tp": {"placement": "split", "exchange": "hidden", "tensor_parallel_size": 2, **BUDGET_16},
}
"""Each specialist on ranks of its own, which are processes: their inside is looked at by calls."""


@pytest.fixture(scope="session", autouse=True)
def shared_groups() -> Iterator[None]:
    """Engines of one process share communication groups, which vLLM takes away with the first engine that ends."""
    gc.collect()
    gc.freeze()  # a start collects garbage nine times, half a second each among all that tests have imported
    with mock.patch("vllm.v1.engine.core.cleanup_dist_env_and_memory"), forked_ranks():
        yield


@pytest.fixture(scope="session")
def tiny_fusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three random specialists of different depth and vocabulary, with a random gate."""
    return write_tiny_fusion(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def judge(tiny_fusion: Path) -> Judge:
    """The Transformers reference of the tiny fusion, in float32."""
    return Judge(UltraFuserForCausalLM.from_fusion(load_fusion(tiny_fusion)))


@pytest.fixture(scope="session")
def engine_of(tiny_fusion: Path, shared_groups: None) -> Iterator[Callable[[str], InProcessEngine]]:
    """The tiny fusion's engine in a configuration of the tables above."""
    engines: dict[str, InProcessEngine] = {}

    def get(configuration: str) -> InProcessEngine:
        if configuration not in engines:
            options = (CONFIGURATIONS | SPLIT)[configuration]
            engine = InProcessEngine(tiny_fusion, **options, **GRAMMAR)
            engines[configuration] = stack.enter_context(engine)
            if configuration.startswith("drafts"):
                engine.drafter = Noisy(engine.drafter)
        return engines[configuration]

    with ExitStack() as stack:
        yield get


@pytest.fixture(params=["sync", "drafts"])
def engine(request: pytest.FixtureRequest, engine_of: Callable[[str], InProcessEngine]) -> InProcessEngine:
    """The tiny fusion's engine as vLLM would run it here, and with drafts."""
    return engine_of(request.param)
