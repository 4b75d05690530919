"""What is known of a step besides its tokens, on its way from the device to the scheduler, beside vLLM's own output.

Nothing waits for it: it is on the host when the step's tokens are.

Shapes: S specialists, B rows that end in a token, X = S + 3 marks of a row (`server.engine.worker.observing`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.v1.outputs import ModelRunnerOutput

from server.engine.worker.timing import Span, StepClock

NUM_OTHER_MARKS = 3
"""Marks of a row that come after the weights."""


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


class StepOnTheWay:
    """One step's record, being copied to the host; it is there when the step's tokens are."""

    def __init__(self, requests: list[str], marks_XB: Tensor | None, clock: StepClock) -> None:
        """Begin to copy; `requests` in the order of B, no marks if there is none."""
        self._requests = requests
        self._clock = clock
        self._marks_XB = torch.empty(NUM_OTHER_MARKS, 0) if marks_XB is None else marks_XB
        if self._marks_XB.device.type != "cpu":
            pinned_XB = torch.empty(self._marks_XB.shape, dtype=self._marks_XB.dtype, pin_memory=True)
            self._marks_XB = pinned_XB.copy_(self._marks_XB, non_blocking=True)

    def arrive(self) -> StepRecord:
        """To be called when the step's tokens are on the host."""
        return StepRecord(self._requests, self._marks_XB.numpy().T.copy(), self._clock.take())


@dataclass
class FusedRunnerOutput(ModelRunnerOutput):
    """A step's output with its record."""

    step: StepRecord | None = None


def with_step(output: ModelRunnerOutput, step: StepOnTheWay) -> FusedRunnerOutput:
    """The output of a step whose tokens are on the host, with its record."""
    own = {field.name: getattr(output, field.name) for field in fields(ModelRunnerOutput)}
    return FusedRunnerOutput(**own, step=step.arrive())
