"""Whole graphs of single tokens: which there are, when a runner finds them, and what drafts read in them."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import CUDAGraphMode
from vllm.forward_context import BatchDescriptor
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher

from benchmarks.gpu_check import OnGPU, exactness
from benchmarks.workload import tiny_fusion
from tests.server.engine.harness import Arrival, InProcessEngine, greedy, random_prompts
from ultrafuser.gating.model.schema import SpeculationSettings
from ultrafuser.server.engine.worker import running_ahead
from ultrafuser.server.engine.worker.graphs import SingleTokenGraphs
from ultrafuser.server.engine.worker.guessing import Guesses
from ultrafuser.server.engine.worker.running_ahead import run_ahead

WHOLE, PARTS, NONE = CUDAGraphMode.FULL, CUDAGraphMode.PIECEWISE, CUDAGraphMode.NONE
PROMPTS = [random_prompts(lengths, seed) for seed, lengths in enumerate([(13, 16, 36), (33, 20, 7), (31, 5, 9)])]


class FakeRunner:
    """What of a runner says which graphs there are: 12 requests at most, 4 drafts each; capturing is noted."""

    def __init__(self, num_drafts: int = 4, mode: CUDAGraphMode = CUDAGraphMode.FULL_AND_PIECEWISE) -> None:
        self.uniform_decode_query_len = 1 + num_drafts
        self.scheduler_config = SimpleNamespace(max_num_seqs=12)
        self.compilation_config = SimpleNamespace(
            cudagraph_mode=mode,
            cudagraph_capture_sizes=[5, 10, 20, 40],
            max_cudagraph_capture_size=40,
            is_attention_compiled_piecewise=lambda: True,
            cudagraph_specialize_lora=False,
            compile_sizes=None,
            mode=None,
            splitting_ops=None,
        )
        self.vllm_config = SimpleNamespace(
            compilation_config=self.compilation_config,
            scheduler_config=self.scheduler_config,
            num_speculative_tokens=num_drafts,
            lora_config=None,
        )
        self.cudagraph_dispatcher = CudagraphDispatcher(self.vllm_config)
        self.cudagraph_dispatcher.initialize_cudagraph_keys(mode, self.uniform_decode_query_len)
        self.captured: list[Any] = []
        self.error: Exception | None = None

    def capture_model(self) -> int:
        """As vLLM's, which makes a dummy batch of requests with so many tokens for each descriptor."""
        self.captured.append((self.uniform_decode_query_len, self.cudagraph_dispatcher.get_capture_descs()))
        if self.error is not None:
            raise self.error
        return 7


@pytest.fixture
def runner() -> FakeRunner:
    return FakeRunner()


@pytest.fixture
def graphs(runner: FakeRunner) -> SingleTokenGraphs:
    """Captured."""
    found = SingleTokenGraphs(runner)
    assert found.capture() == 7
    return found


def test_whole_graphs_are_captured_for_one_token_each_up_to_the_most_requests(
    runner: FakeRunner, graphs: SingleTokenGraphs
) -> None:
    wanted = [BatchDescriptor(num_tokens=own, num_reqs=own, uniform=True) for own in (12, 8, 4, 2, 1)]
    assert runner.captured == [(1, [(WHOLE, wanted)])]
    assert runner.compilation_config.cudagraph_capture_sizes == [5, 10, 20, 40]


@pytest.mark.parametrize(
    ("num_drafts", "mode"), [(0, CUDAGraphMode.FULL_AND_PIECEWISE), (4, PARTS), (4, NONE), (4, WHOLE)]
)
def test_none_are_captured_where_vllms_serve_or_there_are_no_whole_ones(num_drafts: int, mode: CUDAGraphMode) -> None:
    runner = FakeRunner(num_drafts, mode)
    graphs = SingleTokenGraphs(runner)
    assert graphs.capture() == 0
    assert not runner.captured
    assert graphs.find(3)[0] == (PARTS if mode == CUDAGraphMode.FULL_AND_PIECEWISE else mode)


def test_a_failed_capture_leaves_the_runner_with_its_own_graphs(runner: FakeRunner) -> None:
    own, runner.error = runner.cudagraph_dispatcher, RuntimeError("no memory")
    with pytest.raises(RuntimeError, match="no memory"):
        SingleTokenGraphs(runner).capture()
    assert runner.cudagraph_dispatcher is own
    assert runner.uniform_decode_query_len == 5


@pytest.mark.parametrize(
    ("num_requests", "found"),
    [
        (1, (WHOLE, BatchDescriptor(1, 1, uniform=True))),
        (3, (WHOLE, BatchDescriptor(4, 4, uniform=True))),
        (9, (WHOLE, BatchDescriptor(12, 12, uniform=True))),
        (13, (PARTS, BatchDescriptor(20))),
        (41, (NONE, BatchDescriptor(41))),
    ],
)
def test_a_pass_finds_the_smallest_graph_that_holds_it(
    graphs: SingleTokenGraphs, num_requests: int, found: tuple[CUDAGraphMode, BatchDescriptor]
) -> None:
    assert graphs.find(num_requests) == found


@pytest.mark.parametrize(
    ("tokens", "is_single"), [([1, 1, 1], True), ([1, 5, 1], False), ([5, 5, 5], False), ([], False), ([1] * 13, False)]
)
def test_a_step_finds_them_where_every_request_goes_on_by_one_token(
    runner: FakeRunner, graphs: SingleTokenGraphs, tokens: list[int], is_single: bool
) -> None:
    own = runner.cudagraph_dispatcher
    plan: Any = SimpleNamespace(num_scheduled_tokens=dict(enumerate(tokens)), total_num_scheduled_tokens=sum(tokens))
    with graphs.for_step(plan):
        assert (runner.cudagraph_dispatcher is not own) == is_single
        assert runner.uniform_decode_query_len == (1 if is_single else 5)
    assert runner.cudagraph_dispatcher is own
    assert runner.uniform_decode_query_len == 5


def drafts_with(
    engine: InProcessEngine, monkeypatch: pytest.MonkeyPatch, find: Callable[[int], Any], every_other: bool = False
) -> list[list[list[int]]]:
    """What the second specialist guesses after each step, its passes replayed from what `find` says."""
    runner = engine.runner.followers[0]
    found: list[list[list[int]]] = []

    def guess(plan: Any) -> dict[str, list[int]]:
        requests = list(plan)[1::2] if every_other else list(plan)
        if requests:
            with monkeypatch.context() as context:
                context.setattr(runner.single_tokens, "find", find)
                found.append(run_ahead(runner, requests, 4, 256, Guesses([None] * len(requests))))
            table = runner.input_batch.block_table[0].block_table
            assert torch.equal(table.gpu.cpu(), table.cpu)
        return {}

    monkeypatch.setattr(engine, "drafter", SimpleNamespace(propose=guess))
    engine.generate([Arrival(prompts, greedy(12), step=index) for index, prompts in enumerate(PROMPTS)])
    return found


def checked(**given: Any) -> CommonAttentionMetadata:
    """Rows that only fill a graph up belong to no request, write nowhere and attend to nothing."""
    own = int((given["slot_mapping"] >= 0).sum())
    starts = torch.arange(len(given["query_start_loc"]), dtype=torch.int32).clamp(max=own)
    assert torch.equal(given["query_start_loc"], starts)
    assert torch.equal(given["query_start_loc_cpu"], starts)
    assert given["max_seq_len"] == int(given["seq_lens"].max())
    assert not given["seq_lens"][own:].any()
    assert not given["block_table_tensor"][own:].any()
    return CommonAttentionMetadata(**given)


@pytest.mark.parametrize("every_other", [False, True])
def test_a_whole_graphs_buffers_hold_what_passes_read_and_the_block_table_comes_back(
    engine_of: Callable[[str], InProcessEngine], monkeypatch: pytest.MonkeyPatch, every_other: bool
) -> None:
    """A CPU has no graphs, but may read where they would; there the table on the device is the host's own."""
    monkeypatch.setattr(running_ahead, "CommonAttentionMetadata", checked)
    engine = engine_of("drafts")
    own = engine.runner.followers[0].single_tokens.find
    wanted = drafts_with(engine, monkeypatch, own, every_other)
    table = engine.runner.followers[0].input_batch.block_table[0].block_table
    monkeypatch.setattr(table, "gpu", table.cpu.clone())
    whole = drafts_with(
        engine, monkeypatch, lambda size: (WHOLE, BatchDescriptor(size + 2, size + 2, uniform=True)), every_other
    )
    assert len(wanted) >= 10
    assert whole == wanted


@pytest.mark.requires_cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_drafts_of_whole_graphs_are_those_of_passes_without_any() -> None:
    """The tokens are the reference's, whatever is drafted; the drafts would show nothing but in rounds."""
    with tiny_fusion() as path:
        fusion, _ = OnGPU(fusion=path).load()
        found = exactness(
            "tiny", fusion, PROMPTS, num_tokens=12, drafts=SpeculationSettings(min_tokens=4, max_tokens=4)
        )
    ratios = {own.unit: own.ratio for own in found}
    assert ratios["tokens"] == ratios["requests"] == 1
