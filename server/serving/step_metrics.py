"""Counts what the engine's steps report: gate weights, agreement, drafts, times, values that were not finite.

Every token is counted once, when vLLM counts it as generated. Many tokens of a step are observed at once. Knows
reports, not the engine.

Shapes: S specialists, T tokens of one step.
"""

from collections import Counter as Counts
from collections.abc import Iterator, Sequence
from typing import get_args

import numpy as np
from numpy.typing import NDArray
from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from ultrafuser.gating.model.schema import DrafterName
from ultrafuser.server.engine.shared.report import GATE, StepReport
from ultrafuser.server.engine.shared.round import Round, Undrafted

_SHARES = (0.01, 0.05, 0.1, 0.2, 0.33, 0.5, 0.67, 0.8, 0.9, 0.95, 0.99, 1.0)
_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_DRAFTERS = get_args(DrafterName)
_NUM_DRAFTS = (0, 1, 2, 3, 4, 5, 6, 8, 12, 16)
_SHORT_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25)


class BulkHistogram(Collector):
    """A Prometheus histogram with one label that takes an array at a time; the client library's takes one value."""

    def __init__(self, name: str, documentation: str, label: str | None, bounds: Sequence[float]) -> None:
        self._family = (name, documentation)
        self._labels = [] if label is None else [label]
        self._bounds = np.array(bounds)
        self._counts: dict[str, NDArray[np.int64]] = {}
        self._sums: dict[str, float] = {}
        REGISTRY.register(self)

    def observe(self, value: str, samples_T: NDArray[np.float32]) -> None:
        """Add samples under a label's value."""
        places_T = np.searchsorted(self._bounds, samples_T)
        counts = np.bincount(places_T, minlength=len(self._bounds) + 1)
        self._counts[value] = self._counts.get(value, 0) + counts
        self._sums[value] = self._sums.get(value, 0.0) + float(samples_T.sum(dtype=np.float64))

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """The histogram as the registry wants it."""
        family = HistogramMetricFamily(*self._family, labels=self._labels)
        names = [*(floatToGoString(bound) for bound in self._bounds), "+Inf"]
        for value, counts in self._counts.items():
            buckets = list(zip(names, counts.cumsum().tolist(), strict=True))
            family.add_metric([value] if self._labels else [], buckets, self._sums[value])
        yield family


GATE_WEIGHT = BulkHistogram(
    "fused_gate_weight_ratio", "The gate's weight of each generated token.", "specialist", _SHARES
)
GATE_ENTROPY = BulkHistogram(
    "fused_gate_entropy_ratio", "Entropy of a token's weights, as a share of the largest one.", None, _SHARES
)
GATE_TOP = Counter(
    "fused_gate_top_specialist", "Generated tokens by the specialist with the largest weight.", ["specialist"]
)
OVERRIDDEN = Counter(
    "fused_tokens_overridden", "Tokens for which the mixture prefers another than the leading specialist does."
)
AGREEMENT = Counter(
    "fused_specialist_agreement", "Generated tokens by how many specialists prefer one and the same.", ["agreeing"]
)
FORWARD = Histogram(
    "fused_specialist_forward_seconds",
    "Time of a specialist's forward pass; prefill if it reads a prompt.",
    ["specialist", "phase"],
    buckets=_SECONDS,
)
OVERHEAD = Histogram(
    "fused_overhead_seconds",
    "Time of a step's gate, of its mixing, and of what comes from specialists with devices of their own.",
    ["part"],
    buckets=_SHORT_SECONDS,
)
IDLE = Histogram(
    "fused_specialist_idle_seconds",
    "Time of a step in which a specialist with devices of its own waits: the first for others, they for the token.",
    ["specialist"],
    buckets=_SECONDS,
)
NONFINITE = Counter(
    "fused_nonfinite", "Requests that were ended since values of a specialist or the gate were not finite.", ["source"]
)
DRAFT_TOKENS = Counter("fused_draft_tokens", "Drafts that were verified, by who made them.", ["drafter"])
ACCEPTED_TOKENS = Counter("fused_accepted_tokens", "Generated tokens that had been drafted, by who did.", ["drafter"])
UNDRAFTED = Counter("fused_undrafted_requests", "Steps of a request without a draft, by the reason.", ["reason"])
DRAFTS_PER_ROUND = BulkHistogram(
    "fused_drafts_per_round", "Drafts that were verified for a request in a step.", None, _NUM_DRAFTS
)
TOKENS_PER_ROUND = BulkHistogram(
    "fused_tokens_per_round", "Tokens that a request was given in a step.", None, [1 + count for count in _NUM_DRAFTS]
)
LAST_STEP = Gauge("fused_last_step_timestamp_seconds", "When the engine's last step was heard of, in Unix time.")


class StepMetrics:
    """The metrics of one fused model's steps."""

    def __init__(self, specialists: Sequence[str]) -> None:
        """Every series begins at zero, so that its first increase is seen."""
        self._specialists = list(specialists)
        self._top = [GATE_TOP.labels(name) for name in specialists]
        self._agreeing = [AGREEMENT.labels(str(count + 1)) for count in range(len(specialists))]
        self._spans: dict[tuple[str, str | None], Histogram] = {
            (part, None): OVERHEAD.labels(part) for part in ("gate", "exchange", "mix")
        }
        for name in specialists:
            self._spans["idle", name] = IDLE.labels(name)
            self._spans |= {(phase, name): FORWARD.labels(name, phase) for phase in ("prefill", "decode")}
        self._nonfinite = {source: NONFINITE.labels(source) for source in (*specialists, GATE)}
        self._count_weights(np.empty((0, len(self._specialists)), dtype=np.float32))
        for drafter in _DRAFTERS:
            DRAFT_TOKENS.labels(drafter)
            ACCEPTED_TOKENS.labels(drafter)
        for reason in Undrafted:
            UNDRAFTED.labels(reason)
        self._count_rounds([])

    def record(self, report: StepReport) -> None:
        """Count what one step did; a listener of the engine's `steps`."""
        LAST_STEP.set_to_current_time()
        for span in report.spans:
            self._spans[span.part, span.specialist].observe(span.seconds)
        for source in report.nonfinite:
            self._nonfinite[source].inc()
        if len(report.weights_TS):
            self._count_weights(report.weights_TS)
            OVERRIDDEN.inc(int(report.is_overridden_T.sum()))
            _count(self._agreeing, report.num_agreeing_T - 1)
        if report.rounds:
            self._count_rounds(report.rounds)

    def _count_weights(self, weights_TS: NDArray[np.float32]) -> None:
        for name, weights_T in zip(self._specialists, weights_TS.T, strict=True):
            GATE_WEIGHT.observe(name, weights_T)
        GATE_ENTROPY.observe("", entropy_ratio(weights_TS))
        _count(self._top, weights_TS.argmax(axis=1))

    def _count_rounds(self, rounds: Sequence[Round]) -> None:
        drafts, accepted, undrafted = Counts[str](), Counts[str](), Counts[str]()
        for own in rounds:
            if own.drafter is None:
                undrafted[str(own.undrafted)] += 1
            else:
                drafts[own.drafter] += own.num_drafts
                accepted[own.drafter] += own.num_accepted
        for counter, counts in ((DRAFT_TOKENS, drafts), (ACCEPTED_TOKENS, accepted), (UNDRAFTED, undrafted)):
            for label, number in counts.items():
                counter.labels(label).inc(number)
        DRAFTS_PER_ROUND.observe("", np.array([own.num_drafts for own in rounds], dtype=np.float32))
        TOKENS_PER_ROUND.observe("", np.array([own.num_tokens for own in rounds], dtype=np.float32))


def entropy_ratio(weights_TS: NDArray[np.float32]) -> NDArray[np.float32]:
    """Entropy of each row [T]: 0 if one specialist has all the weight (or there is but one), 1 if all have the same."""
    num_specialists = weights_TS.shape[1]
    if num_specialists == 1:
        return np.zeros(len(weights_TS), dtype=np.float32)
    logs_TS = np.log(weights_TS, out=np.zeros_like(weights_TS), where=weights_TS > 0)
    ratio_T: NDArray[np.float32] = -(weights_TS * logs_TS).sum(axis=1) / np.log(num_specialists, dtype=np.float32)
    return ratio_T.clip(0, 1)


def _count(counters: Sequence[Counter], choices_T: NDArray[np.int64]) -> None:
    for counter, number in zip(counters, np.bincount(choices_T, minlength=len(counters)).tolist(), strict=True):
        if number:
            counter.inc(number)
