"""Steps report every token that vLLM counts as generated, once, however requests are scheduled and however they end."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from vllm import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.metrics.loggers import PrometheusStatLogger
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from tests.server.engine.conftest import CONFIGURATIONS
from tests.server.engine.harness import Arrival, InProcessEngine, greedy, random_prompts
from ultrafuser.server.engine.client.step_feed import StepFeed
from ultrafuser.server.engine.core.outputs import add_report
from ultrafuser.server.engine.shared.extra_args import GATE_WEIGHTS
from ultrafuser.server.engine.shared.report import StepReport
from ultrafuser.server.engine.shared.round import Decision, Round, Undrafted
from ultrafuser.server.engine.shared.row import Row
from ultrafuser.server.engine.shared.step import Span, StepRecord

LENGTHS = [(13, 16, 36), (100, 20, 7), (1, 1, 60), (50, 50, 50), (5, 90, 33)]
BATCH = [random_prompts(lengths, seed) for seed, lengths in enumerate(LENGTHS)]
ASKING = {GATE_WEIGHTS: True}
MAX_TOKENS = 20


def counted_by_vllm(engine: InProcessEngine) -> float:
    """`vllm:generation_tokens_total` of this engine."""
    (logger,) = [own for own in engine.llm.logger_manager.stat_loggers if isinstance(own, PrometheusStatLogger)]
    return float(logger.counter_generation_tokens[0]._value.get())


def reports_of(engine: InProcessEngine, arrivals: list[Arrival]) -> tuple[list[Any], list[StepReport]]:
    """Serve the requests; their outputs, and the reports of the steps it took."""
    engine.reports.clear()
    before = counted_by_vllm(engine)
    outputs = engine.generate(arrivals)
    assert sum(len(report.weights_TS) for report in engine.reports) == counted_by_vllm(engine) - before
    return outputs, list(engine.reports)


class WaitingCallers:
    """What of vLLM's output processor a feed stands before."""

    def __init__(self, *requests: str) -> None:
        self.request_states = dict.fromkeys(requests)
        self.seen: Any = None

    def process_outputs(self, outputs: Any) -> None:
        """Nothing."""

    def update_scheduler_stats(self, stats: Any) -> None:
        """What vLLM would see."""
        self.seen = stats


def test_a_report_reaches_another_process_without_the_tokens_that_nobody_waits_for() -> None:
    marks_BX = np.array(
        [[0.25, 0.75, 0, 1, 2, 0], [0.5, 0.5, 0, 0, 1, 0], [math.nan, math.nan, 0, 0, 1, 6]], dtype=np.float32
    )
    rows = [Row(request, 0, is_draft=False, slot=slot) for slot, request in enumerate(["gone", "waiting", "sick"])]
    decisions = {request: Decision(None, Undrafted.UNPAID) for request in ("gone", "waiting")}
    step = StepRecord(rows, marks_BX, [Span("decode", "x", 0.5), Span("gate", None, 0.1)], decisions)
    outputs = {0: EngineCoreOutputs(outputs=[EngineCoreOutput("waiting", [1]), EngineCoreOutput("gone", [2])])}
    assert step.nonfinite == {"sick": 6}
    add_report(outputs, step, step.nonfinite.values())
    received = MsgpackDecoder(EngineCoreOutputs).decode(MsgpackEncoder().encode(outputs[0]))
    processor = WaitingCallers("waiting")
    reports: list[StepReport] = []
    feed = StepFeed(processor, ["x", "y"])
    feed.listen(reports.append)
    processor.process_outputs(received.outputs)
    processor.update_scheduler_stats(received.scheduler_stats)
    (report,) = reports
    assert report.weights_TS.tolist() == [[0.5, 0.5]]
    assert (report.is_overridden_T.tolist(), report.num_agreeing_T.tolist()) == ([False], [1])
    assert (report.nonfinite, report.spans) == (["y", "gate"], step.spans)
    assert report.rounds == [Round(0, None, 0, 0, 1, "unpaid")]
    assert processor.seen.ec_connector_stats is None, "vLLM would take it for its own"


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_the_reported_weights_are_those_of_the_tokens(
    engine_of: Callable[[str], InProcessEngine], configuration: str
) -> None:
    params = greedy(MAX_TOKENS, extra_args=ASKING)
    arrivals = [Arrival(prompts, params, step=index) for index, prompts in enumerate(BATCH)]
    outputs, reports = reports_of(engine_of(configuration), arrivals)
    reported = np.concatenate([report.weights_TS for report in reports])
    wanted = np.concatenate([output.outputs[0].gate_weights for output in outputs])
    assert reported.shape == (len(BATCH) * MAX_TOKENS, 3)
    assert sorted(reported.tolist()) == sorted(wanted.tolist())
    np.testing.assert_allclose(reported.sum(axis=1), 1, atol=1e-6)
    assert {int(number) for report in reports for number in report.num_agreeing_T} <= {1, 2, 3}
    assert any(report.is_overridden_T.any() for report in reports)
    assert not any(report.nonfinite for report in reports)


@pytest.mark.parametrize("configuration", ["sync", "async", "async-pressure-budget-16"])
def test_requests_that_end_early_are_counted_as_vllm_counts_them(
    engine_of: Callable[[str], InProcessEngine], configuration: str
) -> None:
    """Stop strings and departed clients are noticed when the engine has already computed more."""
    engine = engine_of(configuration)
    (whole,) = engine.generate([Arrival(BATCH[0], greedy(MAX_TOKENS))])
    arrivals = [
        Arrival(BATCH[0], greedy(MAX_TOKENS, stop=[whole.outputs[0].text[5:7]])),
        Arrival(BATCH[1], greedy(40), abort_after=6),
        Arrival(BATCH[2], greedy(MAX_TOKENS, stop_token_ids=[int(whole.outputs[0].token_ids[3])])),
        Arrival(BATCH[3], SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=9, ignore_eos=True), step=2),
    ]
    outputs, _ = reports_of(engine, arrivals)
    assert outputs[0].outputs[0].finish_reason == "stop"
    assert len(outputs[0].outputs[0].token_ids) < MAX_TOKENS


@pytest.mark.parametrize("configuration", ["sync", "async-budget-16"])
def test_every_forward_pass_is_timed(engine_of: Callable[[str], InProcessEngine], configuration: str) -> None:
    engine = engine_of(configuration)
    engine.llm.reset_prefix_cache()
    _, reports = reports_of(engine, [Arrival(random_prompts((40, 30, 50), seed=77), greedy(5))])
    spans = [span for report in reports for span in report.spans]
    assert all(0 < span.seconds < 60 for span in spans)
    for name in ("text", "code", "math"):
        parts = [span.part for span in spans if span.specialist == name]
        assert parts.count("decode") >= 4
        assert "prefill" in parts
    assert sum(span.part == "gate" for span in spans) == sum(span.part == "mix" for span in spans) >= 5
