"""Conversations as they are shown: prompts as text, responses token by token with what each token adds to the text.

Knows encoded rows and one tokenizer; does not know pages or pictures.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from ultrafuser.gating.analysis.weights import GateReading

_REPLACEMENT = "\ufffd"  # what bytes that are no whole character decode to


@dataclass(frozen=True)
class ShownToken:
    text: str
    """What it adds to the response: empty if it only begins a character that the next ones complete."""

    weights: tuple[float, ...]
    """Of the specialists, in the fusion's order."""

    loss: float
    """Nats of the fused model."""

    entropy: float
    """Nats of the weights."""

    @property
    def leader(self) -> int:
        """The specialist with the largest weight; the first of equals."""
        return self.weights.index(max(self.weights))


@dataclass(frozen=True)
class Turn:
    """A prompt and the response to it."""

    prompt: str
    """As the first specialist reads it: its template's words included."""

    tokens: tuple[ShownToken, ...]
    """Their texts together are the response, its end token included."""


@dataclass(frozen=True)
class ShownConversation:
    """One conversation of the data."""

    domain: str
    number: int
    """Among the domain's conversations that were read, from 1."""

    turns: tuple[Turn, ...]
    mean_weights: tuple[float, ...]

    @property
    def tokens(self) -> tuple[ShownToken, ...]:
        return tuple(token for turn in self.turns for token in turn.tokens)


def choose(reading: GateReading, count: int, seed: int) -> list[tuple[str, int, int]]:
    """`count` conversations of every domain at random: (domain, number from 1 within it, conversation)."""
    chosen = []
    for domain, rows in reading.domains.items():
        generator = np.random.default_rng(seed)
        numbers = sorted(generator.choice(len(rows), size=min(count, len(rows)), replace=False).tolist())
        chosen += [(domain, number + 1, rows[number]) for number in numbers]
    return chosen


def show(
    reading: GateReading, domain: str, number: int, place: int, row: Mapping[str, Any], tokenizer: Any
) -> ShownConversation:
    """Conversation `place` of the reading as text; `row` is its encoding, `tokenizer` the first specialist's."""
    tokens = slice(reading.offsets[place], reading.offsets[place + 1])
    weights = reading.weights_SN[:, tokens].T.tolist()
    numbers = zip(weights, reading.losses_N[tokens].tolist(), reading.entropy_N[tokens].tolist(), strict=True)
    turns, prompt = [], ""
    # `numbers` runs on from one response to the next: zip asks it last, so none is lost between them.
    pairs = zip(row["response_mask"][0], row["input_ids"][0], strict=True)
    for is_response, own_pairs in groupby(pairs, key=lambda pair: pair[0]):
        ids = [token for _, token in own_pairs]
        if not is_response:
            prompt = _decode(tokenizer, ids)
            continue
        shown = [
            ShownToken(text, tuple(own), loss, entropy)
            for text, (own, loss, entropy) in zip(split_text(tokenizer, ids), numbers, strict=False)
        ]
        turns.append(Turn(prompt, tuple(shown)))
    return ShownConversation(domain, number, tuple(turns), tuple(np.mean(weights, axis=0).tolist()))


def positions_in_responses(mask: Sequence[bool]) -> list[int]:
    """Of every response token in its own response, from 0."""
    return [position for is_response, own in groupby(mask) if is_response for position, _ in enumerate(own)]


def split_text(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text of them all; joined it is that text.

    Tokens of byte-level vocabularies may end within a character: it is given to the token that completes it, and
    those before add nothing (or what comes before it).
    """
    whole = _decode(tokenizer, ids)
    texts: list[str] = []
    given = 0  # characters of the whole that have been given to a token
    begin = middle = offset = 0  # tokens from `begin` on are decoded; those before `middle` are `whole[:offset]`
    for end in range(1, len(ids) + 1):
        found = _decode(tokenizer, ids[begin:end])[len(_decode(tokenizer, ids[begin:middle])) :]
        wanted = whole[offset : offset + len(found)]
        known = len(whole) if end == len(ids) else max(given, offset + _common(found, wanted))
        texts.append(whole[given:known])
        given = known
        if found == wanted and not found.endswith(_REPLACEMENT):
            begin, middle, offset = middle, end, known
    return texts


def _common(one: str, other: str) -> int:
    """How many letters they begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (first, second) in pairs if first != second), min(len(one), len(other)))


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
