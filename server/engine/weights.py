"""The gate's weights of every generated token, on their way from the mixer to the caller.

They ride beside vLLM's own outputs: with the step's output to the scheduler, from there, for requests that asked, in
the field that plain vLLM has for the routing of mixture-of-experts models (an array for each token, which it keeps
aligned with the tokens). Nothing waits for them: they are on the host when the tokens are.

Shapes: S specialists, B rows that end in a token, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.outputs import CompletionOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.engine.output_processor import OutputProcessor, RequestState
from vllm.v1.outputs import ModelRunnerOutput

GATE_WEIGHTS = "gate_weights"
"""Key in `SamplingParams.extra_args`: true asks for the weights of every token of this request."""

Weights = NDArray[np.float32]


@dataclass(frozen=True)
class StepWeights:
    """The weights of one step, on the host. An array: a tensor would take ten times as long between processes."""

    requests: list[str]
    """In the order of the rows."""

    weights_BS: Weights

    def of(self, request: str) -> Weights:
        """[1, S]: of the request's token in this step."""
        row = self.requests.index(request)
        return self.weights_BS[row : row + 1]


class WeightsOnTheWay:
    """The weights of one step, being copied to the host; they are there when the step's tokens are."""

    def __init__(self, requests: list[str], weights_SB: Tensor) -> None:
        """Begin to copy; `requests` in the order of B."""
        self._requests = requests
        self._weights_SB = weights_SB
        if weights_SB.device.type != "cpu":
            pinned_SB = torch.empty(weights_SB.shape, dtype=weights_SB.dtype, pin_memory=True)
            self._weights_SB = pinned_SB.copy_(weights_SB, non_blocking=True)

    def arrive(self) -> StepWeights:
        """To be called when the step's tokens are on the host."""
        return StepWeights(self._requests, self._weights_SB.numpy().T.copy())


@dataclass
class FusedRunnerOutput(ModelRunnerOutput):
    """A step's output with the gate's weights."""

    step_weights: StepWeights | None = None


def with_weights(output: ModelRunnerOutput, weights: WeightsOnTheWay | None) -> ModelRunnerOutput:
    """The output of a step whose tokens are on the host, with the weights beside them."""
    if weights is None:
        return output
    own = {field.name: getattr(output, field.name) for field in fields(ModelRunnerOutput)}
    return FusedRunnerOutput(**own, step_weights=weights.arrive())


def wants_weights(params: SamplingParams | None) -> bool:
    """Whether a request asked for its weights."""
    return bool(params is not None and (params.extra_args or {}).get(GATE_WEIGHTS))


def attach(outputs: Sequence[EngineCoreOutput], weights: StepWeights, wanting: set[str]) -> None:
    """Give the weights to the tokens of the requests that asked."""
    for output in outputs:
        if output.new_token_ids and output.request_id in wanting:
            output.routed_experts = weights.of(output.request_id)


class History:
    """All weights of a request so far, for a stream whose parts may be merged on the way.

    vLLM joins parts that the client has not taken yet, and keeps the newest part's field: every part carries the whole.
    """

    def __init__(self, chunks: Sequence[Weights]) -> None:
        self._chunks = chunks

    def take(self, begin: int, end: int) -> Weights:
        """[end - begin, S]."""
        return np.concatenate(self._chunks[begin:end])


def stream_weights(processor: OutputProcessor) -> None:
    """Let streamed parts carry weights too; vLLM itself hands the field out with the last part only."""
    add_request = processor.add_request

    def add(request: Any, *args: Any, **kwargs: Any) -> None:
        add_request(request, *args, **kwargs)
        if wants_weights(request.sampling_params) and request.sampling_params.output_kind == RequestOutputKind.DELTA:
            _carry_history(processor.request_states[request.request_id])

    processor.add_request = add


def _carry_history(state: RequestState) -> None:
    make = state._new_completion_output

    def with_history(*args: Any, **kwargs: Any) -> CompletionOutput:
        completion = make(*args, **kwargs)
        completion.routed_experts = History(state.routed_experts_chunks)
        return completion

    state._new_completion_output = with_history


class Takeover:
    """Moves the weights of one request's outputs, streamed or final, to `CompletionOutput.gate_weights`."""

    def __init__(self) -> None:
        self._seen: dict[int, int] = {}

    def take(self, completion: CompletionOutput) -> None:
        """Set `gate_weights`: float32 [T, S], one row for each of its `token_ids`; None if they were not asked for."""
        carried: Any = completion.routed_experts
        completion.routed_experts = None
        if isinstance(carried, History):
            begin = self._seen.get(completion.index, 0)
            end = self._seen[completion.index] = begin + len(completion.token_ids)
            carried = carried.take(begin, end) if end > begin else None
        completion.gate_weights = carried
