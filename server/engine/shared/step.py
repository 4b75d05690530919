"""What is known of a step besides its tokens, from the workers to the scheduler, beside vLLM's own output.

Shapes: S specialists, B rows that end in a token, X = S + 3 marks of a row (`server.engine.worker.observing`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from vllm.v1.outputs import ModelRunnerOutput

NUM_OTHER_MARKS = 3
"""Marks of a row that come after the weights."""

NONFINITE_OUTPUT = "nonfinite_output"
"""`stop_reason` of a request that has ended since a value was not finite; its `finish_reason` is "error"."""


class Span(NamedTuple):
    """How long one part of a step took."""

    part: str
    """What was done: "prefill" or "decode" by a specialist, "gate" or "mix" for all."""

    specialist: str | None
    """Whose forward pass it was; None for what is done for all."""

    seconds: float


@dataclass(frozen=True)
class StepRecord:
    """One step, on the host. Arrays: a tensor would take ten times as long between processes."""

    requests: list[str]
    """Those whose row ended in a token, in the order of the rows."""

    marks_BX: NDArray[np.float32]
    """What `observe` found in each row."""

    spans: list[Span]
    """How long parts of this step, or of an earlier one, took."""

    def weights_of(self, request: str) -> NDArray[np.float32]:
        """[1, S]: the gate's weights of the request's token in this step."""
        return self.marks_BX[[self.requests.index(request)], :-NUM_OTHER_MARKS]

    def rows_of(self, requests: Sequence[str]) -> NDArray[np.float32]:
        """[requests, X]: the marks of these requests' tokens."""
        if requests == self.requests:
            return self.marks_BX
        row_of = {request: row for row, request in enumerate(self.requests)}
        return self.marks_BX[[row_of[request] for request in requests]]

    @property
    def nonfinite(self) -> dict[str, int]:
        """By request, the culprits of a row that is not finite: a sum of 2^s, and of 2^S for the gate."""
        culprits_B = self.marks_BX[:, -1]
        return {self.requests[row]: int(culprits_B[row]) for row in culprits_B.nonzero()[0]}


@dataclass
class FusedRunnerOutput(ModelRunnerOutput):
    """A step's output with its record."""

    step: StepRecord | None = None
