"""The gate's weights of every generated token, as they arrive in the API process for the caller who asked.

They ride in the field that plain vLLM has for the routing of mixture-of-experts models: an array for each token, which
it keeps aligned with the tokens.

Shapes: S specialists, T tokens.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from vllm.outputs import CompletionOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.output_processor import OutputProcessor, RequestState

from server.engine.shared.extra_args import wants_weights

Weights = NDArray[np.float32]


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
