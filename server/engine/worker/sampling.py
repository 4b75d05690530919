"""Who draws the token: the leader by vLLM's own sampler, the followers not at all.

Shapes: R requests of a runner's batch, K tokens that a request is given at most in a step.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.v1.outputs import SamplerOutput
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from ultrafuser.server.engine.shared.row import Row
from ultrafuser.server.engine.worker.transfer import to_device


class LeaderDraw:
    """Remembers what the leader's runner drew last, on the device, so that the followers can be given it."""

    token_ids_RK: Tensor
    """In the order of the leader's slots."""

    def __init__(self, leader: GPUModelRunner) -> None:
        self._sample = leader._sample
        leader._sample = self._sample_and_remember
        self.then: Callable[[Tensor], None] = lambda _: None
        """Called with the tokens as soon as they are drawn."""

    def _sample_and_remember(self, *args: Any, **kwargs: Any) -> SamplerOutput:
        output = self._sample(*args, **kwargs)
        self.token_ids_RK = output.sampled_token_ids
        self.then(self.token_ids_RK)
        return output


def in_order_of(rows: Sequence[Row], token_ids_RK: Tensor, drawn: Sequence[Row]) -> Tensor:
    """The leader's tokens in the order of another runner's slots; those of any request where the leader drew none.

    `rows` are all of that runner, `drawn` the leader's that end in a token.
    """
    slot_of = {row.request: row.slot for row in drawn}
    slots = [slot_of.get(row.request, 0) for row in rows if not row.is_draft]
    if slots == list(range(len(token_ids_RK))):
        return token_ids_RK  # the common decode step: no index to copy to the device
    return token_ids_RK[to_device(slots, token_ids_RK.device)]


def no_tokens(follower: GPUModelRunner) -> Tensor:
    """For a step in which no row ends in a token: any, which the follower throws away."""
    return torch.zeros(follower.input_batch.num_reqs, 1, dtype=torch.int32, device=follower.device)


def give(follower: GPUModelRunner, token_ids_RK: Tensor) -> None:
    """Have a follower note these tokens as if it had drawn them; its logits are not looked at."""
    follower._sample = lambda *_: SamplerOutput(sampled_token_ids=token_ids_RK, logprobs_tensors=None)
    follower.sample_tokens(None)
