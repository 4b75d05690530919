"""The end of a request for which a specialist or the gate computed NaN or infinity; no other request is touched.

Such values stay in the request's KV blocks, so these must not be found again by their content, and must be zeroed
before they hold another request's values: attention multiplies what it does not see by zero, and NaN stays NaN. A
request may also leave, or be preempted, before such a value is found: what no row has vouched for is zeroed, too.
"""

import math

from vllm.exceptions import GenerationError
from vllm.logprobs import PromptLogprobs
from vllm.outputs import CompletionOutput
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.request import Request

NONFINITE_OUTPUT = "nonfinite_output"
"""`stop_reason` of a request that ended so; its `finish_reason` is "error"."""


class NonfiniteOutputError(GenerationError):
    """A specialist or the gate computed NaN or infinity for this request, which has ended."""

    def __init__(self) -> None:
        super().__init__("The model computed a value that is not a finite number, and cannot go on with this request.")


def nonfinite_end(request: Request) -> EngineCoreOutput:
    """The last output of a request that has ended so: no token."""
    return EngineCoreOutput(
        request_id=request.request_id,
        new_token_ids=[],
        finish_reason=request.get_finished_reason(),
        stop_reason=NONFINITE_OUTPUT,
        events=request.take_events(),
        trace_headers=request.trace_headers,
    )


def raise_if_nonfinite(completion: CompletionOutput) -> None:
    """Tell the caller of a request that has ended so.

    Raises:
        NonfiniteOutputError: it has.
    """
    if completion.finish_reason == "error" and completion.stop_reason == NONFINITE_OUTPUT:
        raise NonfiniteOutputError


def raise_if_nan(prompt_logprobs: PromptLogprobs) -> None:
    """Tell the caller of a request whose prompt could not be scored: a value was lost before its last row showed it.

    Raises:
        NonfiniteOutputError: a log probability is NaN.
    """
    if any(math.isnan(entry.logprob) for table in prompt_logprobs if table for entry in table.values()):
        raise NonfiniteOutputError
