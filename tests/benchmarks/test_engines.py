"""Engines that are stepped by hand: they end, and leave each other what each has made."""

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.compilation.cuda_graph import CUDAGraphWrapper

from benchmarks.engines import StepEngine, fused_engine, in_this_process
from benchmarks.workload import Request, tiny_fusion
from ultrafuser.gating.model.fusion import load_fusion
from ultrafuser.server.engine.shared.extra_args import fused_input


def weights_of(engine: StepEngine) -> list[float]:
    """A number of each specialist's weights."""
    core = engine.llm.llm_engine.engine_core.engine_core
    runners = core.model_executor.driver_worker.worker.model_runner.runners
    return [float(runner.model.lm_head.weight.abs().max()) for runner in runners]


@pytest.mark.parametrize(("load_format", "is_random"), [(None, False), ("dummy", True)])
def test_every_specialists_weights_are_random_if_asked(load_format: str | None, is_random: bool) -> None:
    with tiny_fusion() as path:
        engine = fused_engine(load_fusion(path), load_format=load_format)
    assert [largest < 0.01 for largest in weights_of(engine)] == [is_random] * 3
    (answer,) = engine.finish([Request([[5, 6], [7], [8]], num_tokens=3)])
    assert len(answer) == 3


class Ending:
    """An engine whose requests end without a token."""

    is_done = False

    def add_request(self, *_: Any) -> None: ...

    def step(self) -> list[Any]:
        self.is_done = True
        return []

    def has_unfinished_requests(self) -> bool:
        return not self.is_done


def test_a_request_that_ends_without_a_token_ends_the_wait() -> None:
    llm: Any = SimpleNamespace(llm_engine=Ending())
    engine = StepEngine(llm, fused_input)
    with pytest.raises(RuntimeError, match="1 requests ended without a token"):
        engine.start([Request([[5]], num_tokens=3)])


def test_an_engine_that_starts_leaves_the_graphs_of_others() -> None:
    wrapper: Any = CUDAGraphWrapper.__new__(CUDAGraphWrapper)
    wrapper.concrete_cudagraph_entries = {"batch": "graph"}
    CUDAGraphWrapper._all_instances.add(wrapper)
    with in_this_process():
        CUDAGraphWrapper.clear_all_graphs()
        assert not wrapper.concrete_cudagraph_entries
    assert wrapper.concrete_cudagraph_entries == {"batch": "graph"}
    CUDAGraphWrapper._all_instances.discard(wrapper)
