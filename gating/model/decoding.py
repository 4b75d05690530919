"""Sampling of the reference: vLLM's definitions of every rule, one row at a time, in the plainest form.

Knows fused logits and token ids. Where vLLM applies what, and in which order: vllm/v1/sample/sampler.py.

Shape suffixes: S specialists, B requests, T positions, V shared vocabulary.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache

if TYPE_CHECKING:
    from ultrafuser.gating.model.reference import UltraFuserForCausalLM


@dataclass(frozen=True, kw_only=True)
class DecodingRules:
    """How tokens are chosen; the same for all requests of a batch. Defaults change nothing: greedy, no penalties."""

    max_new_tokens: int
    """Most tokens per request."""

    eos_token_ids: Sequence[int] = ()
    """A request ends after one of these; it stays in the output."""

    do_sample: bool = False
    """Draw from the distribution instead of taking the likeliest token."""

    temperature: float = 1.0
    """Divides the logits; used only if drawing."""

    top_k: int = 0
    """Keep the k likeliest tokens, and those as likely as the k-th; 0 and -1 keep all."""

    top_p: float = 1.0
    """Keep the likeliest tokens until they hold this probability."""

    min_p: float = 0.0
    """Drop tokens below this share of the likeliest token's probability."""

    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in the leader's prompt or the output."""

    presence_penalty: float = 0.0
    """Subtracted from tokens in the output, once."""

    frequency_penalty: float = 0.0
    """Subtracted from tokens in the output, once per occurrence."""

    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these ids, before the penalties."""

    min_tokens: int = 0
    """No `eos_token_ids` before this many tokens."""


@dataclass(frozen=True)
class Generation:
    """One request's response."""

    token_ids: list[int]
    """T chosen tokens, with the end token if there was one."""

    logprobs: Tensor
    """[T, V]: log-softmax of the fused logits, before any rule (vLLM's `raw_logprobs`)."""

    gate_weights: Tensor
    """[T, S]: how much each specialist counted."""

    top2_gap: Tensor
    """[T]: the best logit less the second best, after penalties: how far the greedy choice was from another one."""


def decode(
    model: "UltraFuserForCausalLM",
    prompts: Sequence[Sequence[Sequence[int]]],
    rules: DecodingRules,
    *,
    generator: torch.Generator | None = None,
    use_cache: bool = False,
) -> list[Generation]:
    """Continue every request until it ends, all in step; see the model's `generate`."""
    _check(model, prompts, rules)
    rows = [_Row(prompt, model.first_memories()) for prompt in prompts]
    next_token = _CachedSteps(model, rows).next_token if use_cache else partial(_next_token_anew, model)
    for _ in range(rules.max_new_tokens):
        active = [row for row in rows if not row.token_ids or row.token_ids[-1] not in rules.eos_token_ids]
        if not active:
            break
        logits_BV, weights_BS = next_token(active)
        for row, logits_V, weights_S in zip(active, logits_BV, weights_BS, strict=True):
            row.append(logits_V, weights_S, rules, generator)
    return [row.generation() for row in rows]


def apply_penalties(
    logits_V: Tensor, prompt_ids: Sequence[int], output_ids: Sequence[int], rules: DecodingRules
) -> Tensor:
    """The logits a greedy choice looks at: min_tokens, bias, repetition, frequency, presence, in this order."""
    logits_V = logits_V.clone()
    num_ids = logits_V.shape[0]
    if len(output_ids) < rules.min_tokens:
        logits_V[list(rules.eos_token_ids)] = -torch.inf
    for token_id, bias in rules.logit_bias.items():
        logits_V[token_id] += bias
    # A prompt may hold ids that only the leader knows; they have no fused logit.
    for token_id in {*prompt_ids, *output_ids} & set(range(num_ids)):
        if logits_V[token_id] > 0:
            logits_V[token_id] /= rules.repetition_penalty
        else:
            logits_V[token_id] *= rules.repetition_penalty
    for token_id, count in Counter(output_ids).items():
        logits_V[token_id] -= rules.frequency_penalty * count
        logits_V[token_id] -= rules.presence_penalty
    return logits_V


def sampling_distribution(logits_V: Tensor, rules: DecodingRules) -> Tensor:
    """Probabilities [V] to draw from: temperature, min_p, top_k, top_p, in this order, on penalised logits."""
    logits_V = logits_V / rules.temperature
    probs_V = logits_V.softmax(dim=-1)
    logits_V = logits_V.masked_fill(probs_V < rules.min_p * probs_V.max(), -torch.inf)
    if 0 < rules.top_k < logits_V.shape[0]:
        kth_best = logits_V.topk(rules.top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < kth_best, -torch.inf)
    if rules.top_p < 1:
        ascending = logits_V.sort()
        beyond = ascending.values.softmax(dim=-1).cumsum(dim=-1) <= 1 - rules.top_p
        beyond[-1] = False
        logits_V[ascending.indices[beyond]] = -torch.inf
    return logits_V.softmax(dim=-1)


class _Row:
    """One request while it is being continued."""

    def __init__(self, prompts: Sequence[Sequence[int]], memories: Sequence[Tensor]) -> None:
        self.prompts = prompts
        self.memories = memories
        self.token_ids: list[int] = []
        self._logprobs: list[Tensor] = []
        self._weights: list[Tensor] = []
        self._gaps: list[Tensor] = []

    def append(
        self, logits_V: Tensor, weights_S: Tensor, rules: DecodingRules, generator: torch.Generator | None
    ) -> None:
        penalised_V = apply_penalties(logits_V, self.prompts[0], self.token_ids, rules)
        best, second = penalised_V.topk(2).values
        if rules.do_sample:
            token = torch.multinomial(sampling_distribution(penalised_V, rules), 1, generator=generator)
        else:
            token = penalised_V.argmax()
        self.token_ids.append(int(token))
        self._logprobs.append(logits_V.log_softmax(dim=-1))
        self._weights.append(weights_S)
        self._gaps.append(best - second)

    def generation(self) -> Generation:
        return Generation(
            self.token_ids, torch.stack(self._logprobs), torch.stack(self._weights), torch.stack(self._gaps)
        )


def _next_token_anew(model: "UltraFuserForCausalLM", active: Sequence[_Row]) -> tuple[Tensor, Tensor]:
    """Fused logits [B, V] and gate weights [B, S] of the active rows, computed from the first token on."""
    batches = [
        left_pad([[*row.prompts[index], *row.token_ids] for row in active], model.device)
        for index in range(len(active[0].prompts))
    ]
    ids, masks = zip(*batches, strict=True)
    memories = _stacked(active)
    logits_BV, weights_SB = model.next_token(ids, masks, memories=memories)
    _keep(active, memories)
    return logits_BV, weights_SB.T


class _CachedSteps:
    """Keeps KV caches of all rows; ended rows go on repeating their last token, and nobody looks at them."""

    def __init__(self, model: "UltraFuserForCausalLM", rows: Sequence[_Row]) -> None:
        self._model = model
        self._rows = rows
        self._caches = [DynamicCache() for _ in rows[0].prompts]
        prompts = [left_pad([row.prompts[index] for row in rows], model.device) for index in range(len(self._caches))]
        self._ids = [ids for ids, _ in prompts]
        self._masks = [mask for _, mask in prompts]

    def next_token(self, active: Sequence[_Row]) -> tuple[Tensor, Tensor]:
        """Fused logits [B, V] and gate weights [B, S] of the active rows."""
        if self._rows[0].token_ids:
            last_B1 = torch.tensor([[row.token_ids[-1]] for row in self._rows], device=self._model.device)
            self._ids = [last_B1 for _ in self._caches]
            self._masks = [torch.cat([mask, torch.ones_like(last_B1)], dim=1) for mask in self._masks]
        memories = _stacked(self._rows)
        logits_BV, weights_SB = self._model.next_token(self._ids, self._masks, self._caches, memories)
        _keep(self._rows, memories)
        chosen = [index for index, row in enumerate(self._rows) if row in active]
        return logits_BV[chosen], weights_SB.T[chosen]


def _stacked(rows: Sequence[_Row]) -> list[Tensor]:
    """The rows' memories of earlier states, S tensors [B, W]; none where a gate has none."""
    return [torch.stack(own) for own in zip(*(row.memories for row in rows), strict=True)]


def _keep(rows: Sequence[_Row], memories: Sequence[Tensor]) -> None:
    for row, *own in zip(rows, *memories, strict=bool(memories)):
        row.memories = own


def left_pad(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask [B, T], padded on the left with id 0 under a zero mask."""
    width = max(len(sequence) for sequence in sequences)
    ids = [[0] * (width - len(sequence)) + list(sequence) for sequence in sequences]
    mask = [[0] * (width - len(sequence)) + [1] * len(sequence) for sequence in sequences]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _check(model: "UltraFuserForCausalLM", prompts: Sequence[Sequence[Sequence[int]]], rules: DecodingRules) -> None:
    num_specialists, num_ids = len(model.specialists), model.config.num_shared_ids
    for index, prompt in enumerate(prompts):
        if len(prompt) != num_specialists or not all(prompt):
            raise ValueError(f"prompts.{index}: need {num_specialists} prompts of at least one token each")
    if not prompts or rules.max_new_tokens < 1:
        raise ValueError("prompts, max_new_tokens: need at least one request and one token")
    unknown = [token_id for token_id in (*rules.eos_token_ids, *rules.logit_bias) if not 0 <= token_id < num_ids]
    if unknown:
        raise ValueError(f"eos_token_ids, logit_bias: {unknown[0]} is not one of the {num_ids} shared ids")
    if rules.do_sample and rules.temperature <= 0:
        raise ValueError("temperature: must be above 0 to sample; leave do_sample out for greedy decoding")
