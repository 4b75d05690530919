"""Small readings written by hand, for tests that need no model."""

from collections.abc import Sequence

import numpy as np

from ultrafuser.gating.analysis.transcripts import ShownConversation, ShownToken, Turn
from ultrafuser.gating.analysis.weights import GateReading


def reading_of(conversations: Sequence[tuple[str, Sequence[Sequence[float]]]], names: Sequence[str]) -> GateReading:
    """Of (domain, weights of each token) pairs; every conversation is one response, every loss 1."""
    counts = [len(tokens) for _, tokens in conversations]
    domains: dict[str, list[int]] = {}
    for index, (domain, _) in enumerate(conversations):
        domains.setdefault(domain, []).append(index)
    return GateReading(
        specialists=tuple(names),
        weights_SN=np.array([weights for _, tokens in conversations for weights in tokens], dtype=float).T,
        losses_N=np.ones(sum(counts)),
        offsets=(0, *np.cumsum(counts).tolist()),
        positions_N=np.concatenate([np.arange(count) for count in counts]),
        domains=domains,
    )


def conversation_of(
    texts: Sequence[str], weights: Sequence[Sequence[float]], domain: str = "code"
) -> ShownConversation:
    """One turn whose tokens have these texts and weights."""
    tokens = [ShownToken(text, tuple(own), 1.5, 0.25) for text, own in zip(texts, weights, strict=True)]
    means = np.mean(weights, axis=0).tolist()
    return ShownConversation("code", 1, (Turn("Ask <b>\n", tuple(tokens)),), tuple(means))
