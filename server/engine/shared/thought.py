"""Where a response's thought begins and ends: the one rule that the parser, the grammar and the budget go by.

A response has one thought at most, at its start. The prompt has opened it already, or the first token does, unless the
prompt has closed it. It ends with the end marker, which belongs to it, or before a token that ends it by itself (the
start of a tool call). Markers behind that are part of the answer. Knows token ids, neither text nor templates.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from vllm.sampling_params import SamplingParams

THOUGHT = "thought"
"""Key in a request's `extra_args`: how its thought is told apart, a `Thought` as plain values."""

Opening = Literal["open", "closed", "unopened"]
"""How the prompt leaves the thought: opened; ended, so that there is none; or to the first token."""


@dataclass(frozen=True)
class Thought:
    """How one request's response is divided into thought and answer."""

    opening: Opening

    start: int
    """Token that opens a thought."""

    end: int
    """Token that ends it."""

    implicit_ends: tuple[int, ...] = ()
    """Tokens that end it, too, and are the answer's first."""

    budget: int | None = None
    """Most tokens of the thought, markers apart; None: any number."""

    def as_plain(self) -> dict[str, Any]:
        """What `extra_args` carry to the engine."""
        return asdict(self)


def thought_of(params: SamplingParams | None) -> Thought | None:
    """How a request's response is divided; None if nothing is told apart in it."""
    plain = (params.extra_args or {}).get(THOUGHT) if params is not None else None
    return None if plain is None else Thought(**plain | {"implicit_ends": tuple(plain["implicit_ends"])})


class ThoughtReader:
    """Follows one response, token by token."""

    def __init__(self, thought: Thought) -> None:
        self.thought = thought
        self.num_read = 0
        """Tokens of the response so far."""

        self.num_thought = 0
        """Tokens of the thought so far, markers apart."""

        self.is_over = thought.opening == "closed"
        """Whether what follows is the answer."""

    @property
    def may_open(self) -> bool:
        """Whether the next token decides if there is a thought."""
        return self.thought.opening == "unopened" and not self.num_read

    @property
    def is_in_thought(self) -> bool:
        """Whether the next token is the thought's, or its end."""
        return not self.is_over and not self.may_open

    @property
    def is_spent(self) -> bool:
        """Whether the budget leaves nothing but the end marker."""
        budget = self.thought.budget
        return budget is not None and self.is_in_thought and self.num_thought >= budget

    def read(self, token_id: int) -> bool:
        """One more token; whether it belongs to the thought, its markers included."""
        may_open, thought = self.may_open, self.thought
        is_first, self.num_read = not self.num_read, self.num_read + 1
        if self.is_over or (may_open and token_id != thought.start):
            self.is_over = True
            return False
        if token_id in thought.implicit_ends:
            self.is_over = True
            return False
        if token_id == thought.end:
            self.is_over = True
        elif not (is_first and token_id == thought.start):  # a prompt may have opened it, and the model does again
            self.num_thought += 1
        return True
