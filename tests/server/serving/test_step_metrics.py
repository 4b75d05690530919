"""What a step reports is counted as Prometheus' own client would count it, value by value."""

import itertools

import numpy as np
import pytest
from prometheus_client import REGISTRY, CollectorRegistry, Histogram

from ultrafuser.server.engine.shared.report import StepReport
from ultrafuser.server.engine.shared.round import Round
from ultrafuser.server.engine.shared.step import Span
from ultrafuser.server.serving import step_metrics
from ultrafuser.server.serving.step_metrics import BulkHistogram, StepMetrics, entropy_ratio

NAMES = itertools.count()


def report(weights: list[list[float]], overridden: list[bool], agreeing: list[int]) -> StepReport:
    return StepReport(
        weights_TS=np.array(weights, dtype=np.float32),
        is_overridden_T=np.array(overridden),
        num_agreeing_T=np.array(agreeing),
        nonfinite=["math", "gate"],
        spans=[Span("decode", "code", 0.02), Span("gate", None, 0.0002)],
        rounds=[Round(0, "leading", 4, 1, 2, None), Round(2, None, 0, 0, 1, "unpaid")],
    )


def value(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


def test_a_histogram_filled_at_once_is_the_one_filled_value_by_value() -> None:
    bounds = (0.1, 0.5, 1.0)
    samples = np.array([0.0, 0.1, 0.3, 0.5, 0.5000001, 1.0, 1.5], dtype=np.float32)
    bulk = BulkHistogram(f"test_bulk_{next(NAMES)}", "For this test.", "who", bounds)
    bulk.observe("a", samples[:3])
    bulk.observe("a", samples[3:])
    registry = CollectorRegistry()
    plain = Histogram("plain", "For this test.", buckets=bounds, registry=registry)
    for sample in samples:
        plain.observe(float(sample))
    (family,) = bulk.collect()
    found = {(s.name.rpartition("_")[2], s.labels.get("le")): s.value for s in family.samples}
    for bound in ("0.1", "0.5", "1.0", "+Inf"):
        # float32(0.1) is a little more than 0.1, and both say so.
        assert found["bucket", bound] == registry.get_sample_value("plain_bucket", {"le": bound})
    assert found["count", None] == 7
    assert found["sum", None] == pytest.approx(registry.get_sample_value("plain_sum"))
    REGISTRY.unregister(bulk)


def test_every_drafter_is_there_before_it_drafts_and_no_other() -> None:
    """A series that begins with its first increment hides that from `increase()`."""
    StepMetrics(["text", "code", "math"])
    for counter in (step_metrics.DRAFT_TOKENS, step_metrics.ACCEPTED_TOKENS):
        (family,) = counter.collect()
        assert {sample.labels["drafter"] for sample in family.samples} == {"leading", "ngram", "head"}


def test_a_step_is_counted() -> None:
    names = [
        ("fused_gate_weight_ratio_count", {"specialist": "text"}, 2),
        ("fused_gate_weight_ratio_sum", {"specialist": "math"}, 0.5),
        ("fused_gate_weight_ratio_bucket", {"specialist": "text", "le": "0.5"}, 1),
        ("fused_gate_entropy_ratio_count", {}, 2),
        ("fused_gate_top_specialist_total", {"specialist": "text"}, 1),
        ("fused_gate_top_specialist_total", {"specialist": "code"}, 1),
        ("fused_tokens_overridden_total", {}, 1),
        ("fused_specialist_agreement_total", {"agreeing": "2"}, 2),
        ("fused_nonfinite_total", {"source": "math"}, 1),
        ("fused_nonfinite_total", {"source": "gate"}, 1),
        ("fused_specialist_forward_seconds_count", {"specialist": "code", "phase": "decode"}, 1),
        ("fused_overhead_seconds_sum", {"part": "gate"}, 0.0002),
        ("fused_draft_tokens_total", {"drafter": "leading"}, 4),
        ("fused_accepted_tokens_total", {"drafter": "leading"}, 1),
        ("fused_undrafted_requests_total", {"reason": "unpaid"}, 1),
        ("fused_drafts_per_round_count", {}, 2),
        ("fused_drafts_per_round_sum", {}, 4),
        ("fused_drafts_per_round_bucket", {"le": "0.0"}, 1),
        ("fused_tokens_per_round_sum", {}, 3),
        ("fused_tokens_per_round_bucket", {"le": "1.0"}, 1),
    ]
    metrics = StepMetrics(["text", "code", "math"])
    before = [value(name, **labels) for name, labels, _ in names]
    metrics.record(report([[0.75, 0.0, 0.25], [0.25, 0.5, 0.25]], [True, False], [2, 2]))
    for (name, labels, grown), old in zip(names, before, strict=True):
        assert value(name, **labels) - old == pytest.approx(grown), name


def test_a_step_without_tokens_is_a_sign_of_life() -> None:
    metrics = StepMetrics(["text", "code", "math"])
    before = value("fused_gate_entropy_ratio_count")
    metrics.record(StepReport(np.empty((0, 3), np.float32), np.empty(0, bool), np.empty(0, int), [], [], []))
    assert value("fused_gate_entropy_ratio_count") == before
    assert value("fused_last_step_timestamp_seconds") > 1.7e9


def test_entropy_is_zero_for_one_voice_and_one_for_equal_voices() -> None:
    weights = np.array([[1, 0, 0], [1 / 3, 1 / 3, 1 / 3], [0.5, 0.5, 0]], dtype=np.float32)
    assert entropy_ratio(weights).tolist() == pytest.approx([0, 1, np.log(2) / np.log(3)])
    assert entropy_ratio(np.ones((2, 1), dtype=np.float32)).tolist() == [0, 0]
