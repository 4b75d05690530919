"""Lines tokens up with the text of a streamed answer, so that each part of it has the gate's weights of its token.

The text is the truth; a token's own text only says where its part ends. The two differ: tokens that begin a character
have no text of their own yet, tokens that end the answer are not shown, a tokenizer may drop a leading space, and where
a stop string could begin the text comes later than its tokens. The playground does the same (tokens.js). Knows no
terminal and no server.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Token:
    """A token as the server names it."""

    name: str
    """Its own text."""

    weights: tuple[float, ...]
    """The gate's, of the specialists in their order."""


@dataclass(frozen=True)
class Piece:
    """A part of an answer's text."""

    text: str
    """What its token adds; empty if that only begins a character, or ends the answer."""

    weights: tuple[float, ...] | None
    """None if the server tells none."""


class Aligner:
    """Gives each token of one answer its part of the text."""

    def __init__(self) -> None:
        self._text = ""
        self._waiting: list[Token] = []

    def push(self, tokens: Sequence[Token], text: str) -> list[Piece]:
        """The pieces that are certain with these tokens and this text of the next event, in order."""
        self._waiting += tokens
        self._text += text
        return list(self._settle())

    def finish(self) -> list[Piece]:
        """What is left once the answer has ended."""
        pieces = list(self._settle())
        for token in self._waiting:
            pieces.append(Piece(self._text, token.weights))
            self._text = ""
        if self._text:
            pieces.append(Piece(self._text, None))
        self._waiting, self._text = [], ""
        return pieces

    def _settle(self) -> Iterator[Piece]:
        while self._waiting and self._text:
            length = self._length_of_first()
            if length is None:
                return
            yield Piece(self._text[:length], self._waiting.pop(0).weights)
            self._text = self._text[length:]

    def _length_of_first(self) -> int | None:
        """Of the first waiting token's part; None if it cannot be known yet."""
        name = self._waiting[0].name
        begin = self._text.find(name) if name else -1
        if begin >= 0 and re.fullmatch(r"[\s\ufffd]*", self._text[:begin]):
            return begin + len(name)
        rest, begun = name.lstrip(), self._text.lstrip()
        if len(rest) > len(begun) and rest.startswith(begun):
            return None
        # A later one fits: this one is not shown. None fits: the last one must be what is there.
        return 0 if len(self._waiting) > 1 else len(self._text)


def mean_weights(pieces: Sequence[Piece]) -> list[float]:
    """Of each specialist, over all tokens; empty if none has weights."""
    rows = [piece.weights for piece in pieces if piece.weights is not None]
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def leader_of(weights: Sequence[float]) -> int:
    """The specialist with the largest weight, the first of equals."""
    return max(range(len(weights)), key=lambda index: weights[index])
