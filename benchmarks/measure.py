"""From samples to a verdict: percentiles, ratios pair by pair, bars. Pure numbers; knows no engine and no file."""

import math
import statistics
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """A record that does not change once it is measured."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Measured(Frozen):
    """One side of a comparison, in the comparison's unit."""

    value: float
    """The number that is compared: the median of the samples, or a total such as tokens per second."""

    mean: float | None = None
    """Mean of the samples; null if there is only the total."""

    p50: float | None = None
    """Median of the samples."""

    p99: float | None = None
    """99th percentile of the samples."""

    num_samples: int = 1
    """How many samples the numbers above are made of."""

    @classmethod
    def of(cls, samples: Sequence[float], scale: float = 1.0) -> "Measured":
        """Summary of samples, each multiplied by `scale` (1000: seconds to milliseconds)."""
        scaled = [sample * scale for sample in samples]
        median = percentile(scaled, 0.5)
        return cls(
            value=median,
            mean=statistics.fmean(scaled),
            p50=median,
            p99=percentile(scaled, 0.99),
            num_samples=len(scaled),
        )


class Bar(Frozen):
    """What a ratio has to reach."""

    limit: float
    """The last ratio that is good enough."""

    direction: Literal["at most", "at least"]
    """On which side of the limit it is good."""

    def is_met_by(self, ratio: float) -> bool:
        """Whether a ratio is good enough; the limit itself is."""
        if math.isnan(ratio):
            return False
        return ratio <= self.limit if self.direction == "at most" else ratio >= self.limit


class Comparison(Frozen):
    """The fused engine and its baseline in one case."""

    case: str
    """What was run, for people: "batch 8"."""

    unit: str
    """Unit of both sides."""

    fused: Measured | None
    """Our side; null if only the baseline was asked for."""

    baseline: Measured | None
    """The other side; null if only the fused engine was asked for."""

    ratio: float | None
    """What the bar judges; the result says which way round. Null if a side is missing."""

    bar: Bar | None = None
    """Null: reported, not judged."""

    note: str | None = None
    """What else was decided during the run."""

    @property
    def key(self) -> str:
        """The case as a name in JSON: "batch_8"."""
        return "_".join("".join(c if c.isalnum() else " " for c in self.case).split())

    @property
    def is_met(self) -> bool | None:
        """Whether the bar is met; None if there is nothing to judge."""
        if self.bar is None or self.ratio is None:
            return None
        return self.bar.is_met_by(self.ratio)


def verdict(comparisons: Sequence[Comparison]) -> bool | None:
    """Whether every bar is met; None if one could not be judged, because a side was not run."""
    if any(comparison.bar is not None and comparison.ratio is None for comparison in comparisons):
        return None
    return all(comparison.is_met is not False for comparison in comparisons)


def percentile(samples: Sequence[float], share: float) -> float:
    """The value below which `share` (0 to 1) of the samples lie, interpolated between the two nearest.

    Raises:
        ValueError: there are no samples, or the share is none.
    """
    if not samples or not 0 <= share <= 1:
        raise ValueError(f"no percentile {share} of {len(samples)} samples")
    ordered = sorted(samples)
    position = share * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Median of the ratios of pairs measured side by side: what slows both sides of a pair down cancels out.

    Raises:
        ValueError: the sequences are empty or of different length.
    """
    return statistics.median(n / d for n, d in zip(numerators, denominators, strict=True))
