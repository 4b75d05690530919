"""What a step hands to the scheduler: the leader's output, every scheduled request named, and the step's record.

Nothing waits for the record: it is on the host when the step's tokens are.

Shapes: B rows that end in a token, X marks of a row (`server/engine/worker/observing.py`; one more in the record).
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from ultrafuser.server.engine.shared.round import Decision
from ultrafuser.server.engine.shared.row import Row
from ultrafuser.server.engine.shared.step import NUM_OTHER_MARKS, StepRecord
from ultrafuser.server.engine.worker.timing import StepClock
from ultrafuser.server.engine.worker.transfer import to_host


class StepOnTheWay:
    """One step's record, being copied to the host; it is there when the step's tokens are."""

    def __init__(
        self, rows: list[Row], marks_XB: Tensor | None, clock: StepClock, decisions: Mapping[str, Decision]
    ) -> None:
        """Begin to copy; `rows` in the order of B, no marks if there is none; `decisions` that led to this step."""
        self._rows, self._decisions = rows, decisions
        self._clock = clock
        self._marks_XB = torch.empty(NUM_OTHER_MARKS, 0) if marks_XB is None else to_host(marks_XB)

    def arrive(self, num_tokens: Mapping[str, int]) -> StepRecord:
        """To be called when the step's tokens are on the host: so many of each request."""
        marks_BX = np.insert(self._marks_XB.numpy().T, -NUM_OTHER_MARKS, self._is_drafted_B(num_tokens), axis=1)
        return StepRecord(self._rows, marks_BX, self._clock.take(), self._decisions)

    def _is_drafted_B(self, num_tokens: Mapping[str, int]) -> NDArray[np.bool_] | bool:
        """Which rows' tokens had been drafted: all of a request's but the last, which was drawn behind them."""
        if not self._decisions:
            return False
        first = {row.request: row.position for row in self._rows if not row.is_draft}
        return np.array(
            [
                row.request in self._decisions and row.position - first[row.request] < num_tokens[row.request] - 1
                for row in self._rows
            ],
            dtype=bool,
        )


class FusedAsyncOutput(AsyncModelRunnerOutput):
    """The leader's asynchronous output, completed when it is collected."""

    def __init__(self, leader_output: AsyncModelRunnerOutput, scheduled: Sequence[str], step: StepOnTheWay) -> None:
        self._leader_output = leader_output
        self._scheduled = scheduled
        self._step = step

    def get_output(self) -> ModelRunnerOutput:
        """Block until the leader's tokens are on the host, and with them the record; then complete them."""
        return completed(self._leader_output.get_output(), self._scheduled, self._step)


def completed(
    output: ModelRunnerOutput | AsyncModelRunnerOutput, scheduled: Sequence[str], step: StepOnTheWay
) -> ModelRunnerOutput | AsyncModelRunnerOutput:
    """The leader's output, at once or when it is collected, with its record and with every scheduled request.

    Those that the leader skipped get no token: the scheduler looks each one up.
    """
    if isinstance(output, AsyncModelRunnerOutput):
        return FusedAsyncOutput(output, scheduled, step)
    for request in scheduled:
        if request not in output.req_id_to_index:
            output.req_id_to_index[request] = len(output.req_ids)
            output.req_ids.append(request)
            output.sampled_token_ids.append([])
    num_tokens = {request: len(own) for request, own in zip(output.req_ids, output.sampled_token_ids, strict=True)}
    output.step = step.arrive(num_tokens)
    return output
