"""What is told of every generated token, as it arrives in the API process for the caller who asked: the gate's
weights, and whether it was drafted.

They ride in the field that plain vLLM has for the routing of mixture-of-experts models: an array for each token, which
it keeps aligned with the tokens.

Shapes: S specialists, T tokens; the array has S + 1 columns.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from vllm.outputs import CompletionOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.output_processor import OutputProcessor, RequestState

from ultrafuser.server.engine.shared.extra_args import wants_marks

Marks = NDArray[np.float32]
Place = tuple[int, int]
"""A chunk, as many rows as its step gave tokens, and a row of it."""


class History:
    """All marks of a request so far, for a stream whose parts may be merged on the way.

    vLLM joins parts that the client has not taken yet, and keeps the newest part's field: every part carries the whole.
    """

    def __init__(self, chunks: Sequence[Marks]) -> None:
        self._chunks = chunks

    def take(self, place: Place, num_tokens: int) -> tuple[Marks, Place]:
        """The next so many tokens' rows [T, S + 1], and where they end."""
        chunk, row = place
        rows: list[Marks] = []
        while num_tokens:
            rows.append(self._chunks[chunk][row : row + num_tokens])
            num_tokens -= len(rows[-1])
            row += len(rows[-1])
            if row == len(self._chunks[chunk]):
                chunk, row = chunk + 1, 0
        return np.concatenate(rows), (chunk, row)


def stream_marks(processor: OutputProcessor) -> None:
    """Let streamed parts carry marks too; vLLM itself hands the field out with the last part only."""
    add_request = processor.add_request

    def add(request: Any, *args: Any, **kwargs: Any) -> None:
        add_request(request, *args, **kwargs)
        if wants_marks(request.sampling_params) and request.sampling_params.output_kind == RequestOutputKind.DELTA:
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
    """Moves the marks of one request's outputs, streamed or final, to where callers look for them."""

    def __init__(self) -> None:
        self._places: dict[int, Place] = {}

    def take(self, completion: CompletionOutput) -> None:
        """Set `gate_weights`, float32 [T, S], and `drafted`, bool [T], one row for each of its `token_ids`; None if
        neither was asked for."""
        carried: Any = completion.routed_experts
        completion.routed_experts = None
        if isinstance(carried, History):
            history, carried, num_tokens = carried, None, len(completion.token_ids)
            if num_tokens:
                place = self._places.get(completion.index, (0, 0))
                carried, self._places[completion.index] = history.take(place, num_tokens)
        completion.gate_weights = None if carried is None else carried[:, :-1]
        completion.drafted = None if carried is None else carried[:, -1] > 0
