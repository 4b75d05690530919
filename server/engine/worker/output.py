"""What a step hands to the scheduler: the leader's output, every scheduled request named, and the step's record.

Nothing waits for the record: it is on the host when the step's tokens are.

Shapes: B rows that end in a token, X marks of a row (`server.engine.worker.observing`).
"""

from dataclasses import fields

import torch
from torch import Tensor
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from server.engine.shared.step import NUM_OTHER_MARKS, FusedRunnerOutput, StepRecord
from server.engine.worker.timing import StepClock


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


class FusedAsyncOutput(AsyncModelRunnerOutput):
    """The leader's asynchronous output, completed when it is collected."""

    def __init__(self, leader_output: AsyncModelRunnerOutput, scheduled: list[str], step: StepOnTheWay) -> None:
        self._leader_output = leader_output
        self._scheduled = scheduled
        self._step = step

    def get_output(self) -> ModelRunnerOutput:
        """Block until the leader's tokens are on the host, and with them the record; then name every request."""
        return with_step(name_all(self._leader_output.get_output(), self._scheduled), self._step)


def name_all(output: ModelRunnerOutput, scheduled: list[str]) -> ModelRunnerOutput:
    """Add the scheduled requests that the leader skipped, with no token: the scheduler looks each one up."""
    for req_id in scheduled:
        if req_id not in output.req_id_to_index:
            output.req_id_to_index[req_id] = len(output.req_ids)
            output.req_ids.append(req_id)
            output.sampled_token_ids.append([])
    return output


def with_step(output: ModelRunnerOutput, step: StepOnTheWay) -> FusedRunnerOutput:
    """The output of a step whose tokens are on the host, with its record."""
    own = {field.name: getattr(output, field.name) for field in fields(ModelRunnerOutput)}
    return FusedRunnerOutput(**own, step=step.arrive())
