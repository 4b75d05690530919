"""The gate's weights on some conversations, and what they say of each domain (paper: Table 6).

Knows numbers; does not know text, files or pictures.

Shape suffixes: S specialists, N response tokens of all conversations, R conversations of a domain, K quantities.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_NUM_RESAMPLES = 2000
INTERVAL = f"95 % bootstrap over conversations, {_NUM_RESAMPLES:,} resamples"


@dataclass(frozen=True)
class GateReading:
    """What the gate made of every response token."""

    specialists: tuple[str, ...]
    """Names, in the fusion's order."""

    weights_SN: Floats
    """They sum to one over S."""

    losses_N: Floats
    """Nats of the fused model."""

    offsets: tuple[int, ...]
    """Conversation i has the tokens from `offsets[i]` to `offsets[i + 1]`."""

    positions_N: NDArray[np.int64]
    """Of each token in its own response, from 0: a conversation may have several responses."""

    domains: Mapping[str, Sequence[int]]
    """Which conversations are of each domain."""

    @cached_property
    def entropy_N(self) -> Floats:
        """Nats, from 0 (one specialist alone) to log S (equal weights)."""
        # A closed gate's weights are exactly 0, whose part is 0.
        weights_SN = self.weights_SN
        logs_SN = np.log(weights_SN, out=np.zeros_like(weights_SN), where=weights_SN > 0)
        # Weights in float32 may sum to a little more than one.
        return np.maximum(-(weights_SN * logs_SN).sum(axis=0), 0)

    @cached_property
    def leaders_N(self) -> NDArray[np.int64]:
        """The specialist with the largest weight; the first of equals."""
        return self.weights_SN.argmax(axis=0)

    @property
    def counts(self) -> Floats:
        """Tokens of each conversation."""
        return np.diff(np.array(self.offsets)).astype(np.float64)

    def conversation_means(self) -> Floats:
        """Mean weights of each conversation, [S, all conversations]."""
        return self.conversation_sums(self.weights_SN) / self.counts

    def conversation_sums(self, values_KN: Floats) -> Floats:
        """Sums over each conversation's tokens, [K, all conversations]."""
        return np.add.reduceat(values_KN, self.offsets[:-1], axis=1)

    def tokens_of(self, domain: str) -> NDArray[np.int64]:
        """Where a domain's tokens are in N."""
        spans = [np.arange(self.offsets[row], self.offsets[row + 1]) for row in self.domains[domain]]
        return np.concatenate(spans)


@dataclass(frozen=True)
class Estimate:
    """A mean over a domain's tokens."""

    mean: float
    """Over all tokens alike."""

    interval: tuple[float, float] | None
    """95 %, by bootstrap over conversations; None of a single conversation, which says nothing of others."""

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + (" [{:.3f}, {:.3f}]".format(*self.interval) if self.interval else "")


@dataclass(frozen=True)
class DomainSummary:
    """The gate on one domain."""

    num_conversations: int
    num_tokens: int

    weights: Mapping[str, Estimate]
    """Mean weight, by specialist."""

    leads: Mapping[str, Estimate]
    """Share of the tokens at which it has the largest weight, by specialist."""

    entropy: Estimate
    """Mean entropy of the weights, nats."""

    @property
    def num_effective(self) -> Estimate:
        """exp of the mean entropy: how many specialists with equal weights would have as much."""
        interval = self.entropy.interval
        low_high = None if interval is None else (float(np.exp(interval[0])), float(np.exp(interval[1])))
        return Estimate(float(np.exp(self.entropy.mean)), low_high)


def summarize(reading: GateReading, seed: int = 0) -> dict[str, DomainSummary]:
    """Mean weights, leads and entropy over the tokens of every domain; `seed` draws the resamples."""
    names, count = reading.specialists, len(reading.specialists)
    leads_SN = (reading.leaders_N == np.arange(count)[:, None]).astype(np.float64)
    sums = reading.conversation_sums(np.concatenate([reading.weights_SN, leads_SN, reading.entropy_N[None]]))
    found = {}
    for domain, rows in reading.domains.items():
        tokens_R = reading.counts[list(rows)]
        estimates = _estimate(sums[:, list(rows)], tokens_R, np.random.default_rng(seed))
        found[domain] = DomainSummary(
            num_conversations=len(rows),
            num_tokens=int(tokens_R.sum()),
            weights=dict(zip(names, estimates[:count], strict=True)),
            leads=dict(zip(names, estimates[count:-1], strict=True)),
            entropy=estimates[-1],
        )
    return found


def _estimate(sums_KR: Floats, tokens_R: Floats, generator: np.random.Generator) -> list[Estimate]:
    """Means per token of K quantities; conversations, whose tokens resemble each other, are drawn whole."""
    means_K = sums_KR.sum(axis=1) / tokens_R.sum()
    num_rows = len(tokens_R)
    if num_rows < 2:
        return [Estimate(float(mean), None) for mean in means_K]
    # How often each conversation is drawn: the same as drawing their numbers, in less memory.
    draws = generator.multinomial(num_rows, np.full(num_rows, 1 / num_rows), size=_NUM_RESAMPLES)
    resampled = (draws @ sums_KR.T) / (draws @ tokens_R)[:, None]
    lows, highs = np.quantile(resampled, [0.025, 0.975], axis=0)
    return [
        Estimate(float(mean), (float(low), float(high))) for mean, low, high in zip(means_K, lows, highs, strict=True)
    ]
