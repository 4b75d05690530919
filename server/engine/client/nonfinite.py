"""What a caller is told of a request for which a specialist or the gate computed NaN or infinity."""

import math

from vllm.exceptions import GenerationError
from vllm.logprobs import PromptLogprobs
from vllm.outputs import CompletionOutput

from ultrafuser.server.engine.shared.step import NONFINITE_OUTPUT


class NonfiniteOutputError(GenerationError):
    """A specialist or the gate computed NaN or infinity for this request, which has ended."""

    def __init__(self) -> None:
        super().__init__("The model computed a value that is not a finite number, and cannot go on with this request.")


def raise_if_nonfinite(completion: CompletionOutput) -> None:
    """Raise `NonfiniteOutputError` to the caller of a request that has ended so."""
    if completion.finish_reason == "error" and completion.stop_reason == NONFINITE_OUTPUT:
        raise NonfiniteOutputError


def raise_if_nan(prompt_logprobs: PromptLogprobs) -> None:
    """Raise `NonfiniteOutputError` if a prompt could not be scored: a value was lost before its last row showed it."""
    if any(math.isnan(entry.logprob) for table in prompt_logprobs if table for entry in table.values()):
        raise NonfiniteOutputError
