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

from ultrafuser.server.engine.shared.extra_args import wants_weights

Weights = NDArray[np.float32]
Place = tuple[int, int]
"""A chunk, as many rows as its step gave tokens, and a row of it."""


class History:
    """All weights of a request so far, for a stream whose parts may be merged on the way.

    vLLM joins parts that the client has not taken yet, and keeps the newest part's field: every part carries the whole.
    """

    def __init__(self, chunks: Sequence[Weights]) -> None:
        self._chunks = chunks

    def take(self, place: Place, num_tokens: int) -> tuple[Weights, Place]:
        """The next so many tokens' rows [T, S], and where they end."""
        chunk, row = place
        rows: list[Weights] = []
        while num_tokens:
            rows.append(self._chunks[chunk][row : row + num_tokens])
            num_tokens -= len(rows[-1])
            row += len(rows[-1])
            if row == len(self._chunks[chunk]):
                chunk, row = chunk + 1, 0
        return np.concatenate(rows), (chunk, row)


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
        self._places: dict[int, Place] = {}

    def take(self, completion: CompletionOutput) -> None:
        """Set `gate_weights`: float32 [T, S], one row for each of its `token_ids`; None if they were not asked for."""
        carried: Any = completion.routed_experts
        completion.routed_experts = None
        if isinstance(carried, History):
            history, carried, num_tokens = carried, None, len(completion.token_ids)
            if num_tokens:
                place = self._places.get(completion.index, (0, 0))
                carried, self._places[completion.index] = history.take(place, num_tokens)
        completion.gate_weights = carried
