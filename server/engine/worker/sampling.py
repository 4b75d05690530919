"""Who draws the token: the leader by vLLM's own sampler, the followers not at all.

Shapes: R rows of a runner's batch.
"""

from typing import Any

from torch import Tensor, nn
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.sampler import Sampler


class LeaderSampler(nn.Module):
    """vLLM's sampler, which also remembers the tokens it drew so that the followers can be given them."""

    def __init__(self, sampler: Sampler) -> None:
        super().__init__()
        self._sampler = sampler
        self.token_ids_R1: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> SamplerOutput:
        """Sample as vLLM does."""
        output = self._sampler(*args, **kwargs)
        self.token_ids_R1 = output.sampled_token_ids
        return output

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("_sampler"), name)


class FollowerSampler(nn.Module):
    """Stands in for a follower's sampler: hands out the leader's tokens and draws no random number."""

    def __init__(self) -> None:
        super().__init__()
        self.token_ids_R1: Tensor | None = None

    def forward(self, logits: Tensor, sampling_metadata: object) -> SamplerOutput:
        """The tokens [R, 1] laid out for this follower's rows; the logits are not looked at."""
        assert self.token_ids_R1 is not None
        return SamplerOutput(sampled_token_ids=self.token_ids_R1, logprobs_tensors=None)
