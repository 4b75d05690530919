"""What is known of a step besides its tokens, from the workers to the scheduler, beside vLLM's own output.

Shapes: S specialists, B rows that end in a token, T tokens that are handed out, X = S + 4 marks of a row: those of
`server/engine/worker/observing.py`, and behind the S weights whether the row's token was drafted.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ultrafuser.server.engine.shared.round import Decision, Round, Undrafted
from ultrafuser.server.engine.shared.row import Row

NUM_OTHER_MARKS = 3
"""Marks of a row that come after the weights and the mark of a draft."""

NONFINITE_OUTPUT = "nonfinite_output"
"""`stop_reason` of a request that has ended since a value was not finite; its `finish_reason` is "error"."""


class Span(NamedTuple):
    """How long one part of a step took."""

    part: str
    """What was done: "prefill" or "decode" by a specialist, "gate" or "mix" for all; where each specialist has devices
    of its own, "exchange" of their rows, and "idle" while one waits for the others."""

    specialist: str | None
    """Whose time it was; None for what is done for all."""

    seconds: float


@dataclass(frozen=True)
class StepRecord:
    """One step, on the host; its output carries it as `step`. Arrays: tensors take ten times as long to be sent."""

    rows: list[Row]
    """Those that ended in a token; a request's rows are neighbours, by position."""

    marks_BX: NDArray[np.float32]
    """What `observe` found in each row, and 1 behind the weights if the token that followed had been drafted."""

    spans: list[Span]
    """How long parts of this step, or of an earlier one, took."""

    decisions: Mapping[str, Decision] = field(default_factory=dict)
    """What had been done before the step to give a request several tokens; nothing for those whose tokens are given."""

    def rows_of(self, tokens: Iterable[tuple[str, int]]) -> NDArray[np.float32]:
        """[T, X]: the marks of the tokens that requests were given in this step, as (request, how many)."""
        return self.marks_BX[[self._first[request] + index for request, count in tokens for index in range(count)]]

    def marks_of(self, request: str, num_tokens: int) -> NDArray[np.float32]:
        """[T, S + 1]: the gate's weights of so many tokens that the request was given in this step, and 1 for each that
        had been drafted."""
        return self.rows_of([(request, num_tokens)])[:, :-NUM_OTHER_MARKS]

    def rounds_of(self, tokens: Iterable[tuple[str, int]]) -> list[Round]:
        """The rounds among the requests that were given tokens in this step, as (request, how many)."""
        rounds: list[Round] = []
        place = 0
        for request, count in tokens:
            if count and request in self.decisions:
                rounds.append(self._round(request, count, place))
            place += count
        return rounds

    def _round(self, request: str, num_tokens: int, place: int) -> Round:
        drafter, undrafted = self.decisions[request]
        num_drafts = self._num_rows[request] - 1
        if not num_drafts:
            return Round(place, None, 0, 0, num_tokens, undrafted or Undrafted.CUT)
        first = self._first[request]
        num_accepted = int(self.marks_BX[first : first + num_tokens, -NUM_OTHER_MARKS - 1].sum())
        return Round(place, drafter, num_drafts, num_accepted, num_tokens, None)

    @property
    def nonfinite(self) -> dict[str, int]:
        """By request, the culprits of rows that are not finite: a sum of 2^s, and of 2^S for the gate."""
        found: dict[str, int] = {}
        for index in self.marks_BX[:, -1].nonzero()[0]:
            request = self.rows[index].request
            found[request] = found.get(request, 0) | int(self.marks_BX[index, -1])
        return found

    @cached_property
    def _first(self) -> dict[str, int]:
        """Where each request's rows begin."""
        return {row.request: index for index, row in reversed([*enumerate(self.rows)])}

    @cached_property
    def _num_rows(self) -> Counter[str]:
        return Counter(row.request for row in self.rows)

    def __reduce__(self) -> tuple[Callable[..., "StepRecord"], tuple[Any, ...]]:
        """As columns: row by row the way between processes takes several times as long."""
        return _from_columns, ([*zip(*self.rows, strict=True)], self.marks_BX, self.spans, self.decisions)


def _from_columns(columns: list[Any], *others: Any) -> StepRecord:
    return StepRecord([Row(*own) for own in zip(*columns, strict=True)], *others)
