"""A conversation as data: what is sent with the next message, and what is saved. Knows no terminal and no server."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ultrafuser.server.terminal.pieces import Piece, mean_weights

STOPPED = "stopped"
"""The reason of an answer's end where its reader has stopped it."""


@dataclass(frozen=True)
class Answer:
    """What came of one message."""

    pieces: Sequence[Piece]

    finish_reason: str
    """As the server says it, or `STOPPED`."""

    @property
    def text(self) -> str:
        """All of it, without the thought."""
        return "".join(piece.text for piece in self.pieces)


@dataclass
class Dialogue:
    """Turns that have an answer: a message whose turn fails never gets in."""

    system: str = ""
    turns: list[tuple[str, Answer]] = field(default_factory=list)

    def messages(self, *question: str) -> list[dict[str, str]]:
        """What a model reads: all turns, and the question behind them."""
        head = [{"role": "system", "content": self.system}] if self.system else []
        turns = [
            {"role": role, "content": text}
            for asked, answer in self.turns
            for role, text in (("user", asked), ("assistant", answer.text))
        ]
        return [*head, *turns, *({"role": "user", "content": text} for text in question)]

    def as_json(self, model: str, specialists: Sequence[str]) -> dict[str, Any]:
        """A row that `ultrafuser train` reads as well, as far as its messages go; the weights are in `answers`."""
        answers = [
            {
                "finish_reason": answer.finish_reason,
                "mean_weights": mean_weights(answer.pieces),
                "tokens": [{"text": piece.text, "gate_weights": piece.weights} for piece in answer.pieces],
            }
            for _, answer in self.turns
        ]
        return {
            "messages": self.messages(),
            "model": model,
            "specialists": list(specialists),
            "answers": answers,
        }
