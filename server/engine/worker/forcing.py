"""Responses that are given, not sampled: the fused model reads a text token by token and says what it makes of it.

A request carries the tokens of its response. In every step each specialist runs as for a sampled response, the sampler
works as always (logprobs are those of the fused logits), and then the given token takes the sampled one's place.
Knows requests and rows, not text.

Shapes: R rows of logits, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from vllm.v1.sample.sampler import Sampler
from vllm.v1.worker.gpu_input_batch import CachedRequestState

from ultrafuser.server.engine.shared.extra_args import forced_token_ids
from ultrafuser.server.engine.shared.row import Row
from ultrafuser.server.engine.worker.transfer import to_device


def given_tokens(rows: Sequence[Row], requests: Mapping[str, CachedRequestState]) -> dict[int, int]:
    """The token that the response of a row's request has at its position, by number of the row; none if it is sampled.

    `requests` are those that the leader's runner knows, by id.
    """
    found = {}
    for number, row in enumerate(rows):
        given = forced_token_ids(requests[row.request].sampling_params)
        if given is not None and row.position < len(given):
            found[number] = given[row.position]
    return found


class Forcing:
    """Sits in vLLM's sampler, between sampling and logprobs."""

    def __init__(self, sampler: Sampler) -> None:
        self._sample = sampler.sample
        self._given: Mapping[int, int] = {}
        self._tokens: Mapping[int, int] = {}
        sampler.sample = self._sample_or_force

    def set(self, tokens: Mapping[int, int]) -> None:
        """What this step gives: token by row of the step's logits; other rows are sampled."""
        self._given = self._tokens = tokens

    def look_at(self, numbers: Sequence[int]) -> None:
        """Which of the step's rows the sampler sees in its next call, where it does not see all of them."""
        self._tokens = {index: self._given[number] for index, number in enumerate(numbers) if number in self._given}

    @property
    def is_asked(self) -> bool:
        """Whether this step gives anything."""
        return bool(self._given)

    def _sample_or_force(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        sampled_R, processed_RV = self._sample(*args, **kwargs)
        if self._tokens:
            rows = to_device(list(self._tokens), sampled_R.device)
            given = to_device(list(self._tokens.values()), sampled_R.device, sampled_R.dtype)
            sampled_R = sampled_R.index_copy(0, rows, given)
        return sampled_R, processed_RV
