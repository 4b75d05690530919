"""Responses that are given, not sampled: the fused model reads a text token by token and says what it makes of it.

A request carries the tokens of its response. In every step each specialist runs as for a sampled response, the sampler
works as always (logprobs are those of the fused logits), and then the given token takes the sampled one's place.
Knows requests and the plan of a step, not text.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.sample.sampler import Sampler

from server.engine.shared.extra_args import forced_token_ids
from server.engine.worker.view import scheduled_requests


def forced_in_step(output: SchedulerOutput, params_of: Callable[[str], SamplingParams | None]) -> dict[str, int]:
    """The given token that each scheduled request comes to in this step, if the step gets that far.

    Args:
        output: the scheduler's plan.
        params_of: a request's sampling parameters.
    """
    found = {}
    for request, _, num_outputs in scheduled_requests(output):
        given = forced_token_ids(params_of(request))
        if given is not None and num_outputs < len(given):
            found[request] = given[num_outputs]
    return found


class Forcing:
    """Sits in vLLM's sampler, between sampling and logprobs."""

    def __init__(self, sampler: Sampler) -> None:
        self._sample = sampler.sample
        self._tokens: Mapping[int, int] = {}
        sampler.sample = self._sample_or_force

    def set(self, tokens: Mapping[int, int]) -> None:
        """What the next call gives: token by row of the batch; other rows are sampled."""
        self._tokens = tokens

    def _sample_or_force(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        sampled_R, processed_RV = self._sample(*args, **kwargs)
        if self._tokens:
            rows = torch.tensor(list(self._tokens), device=sampled_R.device)
            given = torch.tensor(list(self._tokens.values()), dtype=sampled_R.dtype, device=sampled_R.device)
            sampled_R = sampled_R.index_copy(0, rows, given)
        return sampled_R, processed_RV
