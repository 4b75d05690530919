"""95 % intervals of scores. Knows numbers only."""

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy

NUM_RESAMPLES = 10_000
_CONFIDENCE = 0.95


def wilson_interval(num_right: float, num_items: int) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927): low and high, within 0 to 1.

    Args:
        num_right: successes among the items.
        num_items: at least 1.
    """
    z = NormalDist().inv_cdf(0.5 + _CONFIDENCE / 2)
    share = num_right / num_items
    scale = 1 + z**2 / num_items
    middle = (share + z**2 / (2 * num_items)) / scale
    half = z * math.sqrt(share * (1 - share) / num_items + z**2 / (4 * num_items**2)) / scale
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap_interval(parts: Sequence[float], wholes: Sequence[float], seed: int) -> tuple[float, float]:
    """Percentile bootstrap of sum(parts) / sum(wholes) over questions: low and high.

    Questions are drawn whole, since what is judged within one belongs together. With wholes of 1 it is the mean's.

    Args:
        parts: of each question.
        wholes: of each question, positive.
        seed: of the draws.
    """
    generator = numpy.random.default_rng(seed)
    part, whole = numpy.asarray(parts, dtype=float), numpy.asarray(wholes, dtype=float)
    values = numpy.empty(NUM_RESAMPLES)
    for index in range(NUM_RESAMPLES):
        drawn = generator.integers(len(part), size=len(part))
        values[index] = part[drawn].sum() / whole[drawn].sum()
    low, high = numpy.quantile(values, [0.5 - _CONFIDENCE / 2, 0.5 + _CONFIDENCE / 2])
    return float(low), float(high)
