"""How a drafter chooses among the next tokens: as the sampler will, with the random numbers that it will use.

The sampler's tokens do not depend on the drafts, so that both can be drawn with the same noise: two distributions that
are close then give the same token most of the time, where the likeliest token would be right only as often as it is
drawn (Daliri et al. 2024, "Coupling without Communication and Drafter-Invariant Speculative Decoding",
arXiv 2408.07978). A guess may be anything: penalties, bias and masks are left out here.

vLLM's sampler on a CPU takes one number a token from the request's generator, and noise that depends on it and the
token's id alone. Requests without a seed are given a generator of their own. Elsewhere drafts are the likeliest tokens.

What is known of a draw is plain numbers: a specialist that guesses need not be where tokens are drawn.

Shapes: B requests that run ahead, Q of them that sample, K drafts, V vocabulary, C candidates.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from vllm.sampling_params import SamplingType
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

NUM_CANDIDATES = 128
"""Where a request limits what may be drawn (top_p, top_k, min_p), a guess is one of so many likeliest tokens: sorting
the whole vocabulary, as the sampler does, takes as long as a pass."""

_ALL = 2**31
"""In the place of top_k where there is none."""

NUM_SEEDS = 2**31
"""The sampler's noise begins with a number below this (`vllm/v1/sample/ops/topk_topp_sampler.py`, `forward_cpu`)."""


class Draw(NamedTuple):
    """How the next tokens of a request that samples will be drawn."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seeds: list[int]
    """The number that the sampler will take for each token."""


def foreseen(leader: GPUModelRunner, requests: Sequence[str], num_tokens: int) -> list[Draw | None]:
    """What can be known of the next so many draws of each request; None: the likeliest token is the best guess.

    `leader` draws the tokens.
    """
    is_foreseeable = _is_foreseeable(leader)
    return [_draw_of(leader, request, num_tokens) if is_foreseeable else None for request in requests]


class Guesses:
    """Chooses the next tokens of requests, one pass after the other."""

    def __init__(self, draws: Sequence[Draw | None]) -> None:
        """What is foreseen of each request, in the order of B."""
        self._rows_Q = torch.tensor([index for index, own in enumerate(draws) if own is not None], dtype=torch.int64)
        if sampled := [own for own in draws if own is not None]:
            self._seeds_QK = torch.tensor([own.seeds for own in sampled])
            self._temperatures_Q = torch.tensor([own.temperature for own in sampled])
            self._limits = _Limits(sampled)

    def choose(self, logits_BV: Tensor, index: int) -> Tensor:
        """The tokens [B] of guess `index`, which counts from 0; V are the first ids of the sampler's vocabulary."""
        guesses_B = logits_BV.argmax(dim=-1)
        if len(self._rows_Q):
            scaled_QV = logits_BV[self._rows_Q].float() / self._temperatures_Q[:, None]
            allowed_QV = self._limits.apply(scaled_QV)
            guesses_B[self._rows_Q] = torch.ops._C.fused_gumbel_argmax(allowed_QV, self._seeds_QK[:, index])
        return guesses_B


class _Limits:
    """What requests let be drawn: of the likeliest tokens so many, and so much probability."""

    def __init__(self, draws: Sequence[Draw]) -> None:
        self._top_p_Q = torch.tensor([own.top_p for own in draws])
        self._min_p_Q = torch.tensor([own.min_p for own in draws])
        self._top_k_Q = torch.tensor([own.top_k if own.top_k > 0 else _ALL for own in draws])

    def apply(self, scaled_QV: Tensor) -> Tensor:
        """The same with minus infinity for what may not be drawn: by min_p and top_k, and by top_p of what remains."""
        num_ids = scaled_QV.shape[1]
        is_limited_Q = (self._top_p_Q < 1) | (self._min_p_Q > 0) | (self._top_k_Q < num_ids)
        if not is_limited_Q.any():
            return scaled_QV
        scaled_QC, ids_QC = scaled_QV.topk(min(NUM_CANDIDATES, num_ids), dim=-1)
        is_likely_QC = scaled_QC >= scaled_QC[:, :1] + self._min_p_Q[:, None].log()
        is_first_QC = torch.arange(len(ids_QC[0])) < self._top_k_Q[:, None]
        probs_QC = scaled_QC.where(is_likely_QC & is_first_QC, -torch.inf).softmax(dim=-1)
        is_kept_QC = (probs_QC > 0) & (probs_QC.cumsum(dim=-1) - probs_QC < self._top_p_Q[:, None])
        kept_QC = scaled_QC.where(is_kept_QC, -torch.inf)
        limited_QV = torch.full_like(scaled_QV, -torch.inf).scatter(1, ids_QC, kept_QC)
        return limited_QV.where(is_limited_Q[:, None], scaled_QV)


def _is_foreseeable(leader: GPUModelRunner) -> bool:
    """Whether the sampler's noise can be known before it draws."""
    sampler = leader.sampler.topk_topp_sampler
    return sampler.forward == sampler.forward_cpu and not sampler.use_fp64_gumbel


def _draw_of(leader: GPUModelRunner, request: str, num_tokens: int) -> Draw | None:
    params = leader.requests[request].sampling_params
    if params is None or params.sampling_type == SamplingType.GREEDY:
        return None
    seeds = _next_seeds(leader, request, num_tokens)
    return Draw(params.temperature, params.top_p, params.top_k, params.min_p, seeds)


def _next_seeds(leader: GPUModelRunner, request: str, num_tokens: int) -> list[int]:
    """The numbers that the sampler will take for the request's next tokens."""
    ahead = torch.Generator()
    ahead.set_state(_generator_of(leader, request).get_state())
    return [int(torch.randint(0, NUM_SEEDS, (1,), generator=ahead).item()) for _ in range(num_tokens)]


def _generator_of(leader: GPUModelRunner, request: str) -> torch.Generator:
    """The request's own generator; made, if the request has no seed, out of the one that draws for all such requests,
    which goes on alike on every rank."""
    state, batch = leader.requests[request], leader.input_batch
    if state.generator is None:
        state.generator = torch.Generator()
        state.generator.manual_seed(int(torch.randint(0, 2**32, (1,)).item()))
        batch.generators[batch.req_id_to_index[request]] = state.generator
    return state.generator
