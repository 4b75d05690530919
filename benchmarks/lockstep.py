"""The fused model in plain Transformers, as one would write it well: batched, cached, n models in lockstep.

The baseline of `benchmarks.peers`; a test holds its tokens to the engine's. Greedy. A batch runs until its last
response is complete, as batches do without a scheduler. Knows no vLLM.

Shape suffixes: S specialists, B requests, T positions (left-padded, per specialist), D hidden size, V ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from benchmarks.workload import Request
from ultrafuser.gating.model.fusion import FusedModelInfo, FusionConfig, SpecialistConfig
from ultrafuser.gating.model.gate import Gate
from ultrafuser.gating.model.gate_file import load_gate
from ultrafuser.gating.model.mixture import fuse
from ultrafuser.server.engine.shared.dtype import dtypes_of

CacheKind = Literal["dynamic", "static"]
"""Transformers' growing cache, copied in every step, or its cache of fixed size, read as a whole in every step."""


@dataclass
class _Context:
    """What one specialist has read of the batch."""

    cache: Any
    mask_BT: Tensor | None
    """1 where a token is, with room for the whole response; None if no row is padded: attention is quicker then."""
    next_position_B1: Tensor
    """Position of each row's next token; padding has none."""
    length: int = 0
    """Positions in the cache, padding included."""


class LockstepLoop:
    """n Transformers models, one gate, one batch at a time."""

    def __init__(self, fusion: FusionConfig, info: FusedModelInfo, cache_kind: CacheKind = "dynamic") -> None:
        """Load the weights of a materialized fusion, in its own types."""
        self.cache_kind: CacheKind = cache_kind
        self._models = list(map(_load, fusion.specialists, dtypes_of(fusion)))
        self._gate = None
        if fusion.gate is not None:
            self._gate = load_gate(fusion.gate, fusion.specialist_names, info.hidden_sizes).eval()
        self._num_shared_ids = info.num_shared_ids
        self._contexts: list[_Context] = []
        self._tokens_B1: list[Tensor] = []
        self._memories_SBW: list[Tensor] = []
        """What a smoothed gate has of the responses' earlier states."""

    @property
    def token_ids(self) -> list[list[int]]:
        """What was generated, one list per request, all of the same length."""
        return torch.cat(self._tokens_B1, dim=1).tolist() if self._tokens_B1 else []

    @property
    def num_steps(self) -> int:
        """Tokens per request so far."""
        return len(self._tokens_B1)

    @torch.inference_mode()
    def start(self, requests: Sequence[Request]) -> None:
        """Read the prompts, left-padded, and choose the first token of each response."""
        num_tokens = max(request.num_tokens for request in requests)
        self._contexts, self._memories_SBW, last_SBD = [], [], []
        for index, model in enumerate(self._models):
            prompts = [request.prompts[index] for request in requests]
            context, last_BD = self._read_prompts(model, prompts, num_tokens)
            self._contexts.append(context)
            last_SBD.append(last_BD)
        self._tokens_B1 = [self._choose(last_SBD)]

    @torch.inference_mode()
    def step(self) -> None:
        """One more token for every request of the batch."""
        tokens_B1 = self._tokens_B1[-1]
        last_SBD = [
            _read(model, context, tokens_B1, context.next_position_B1)
            for model, context in zip(self._models, self._contexts, strict=True)
        ]
        self._tokens_B1.append(self._choose(last_SBD))

    def stop(self) -> None:
        """Forget the batch."""
        self._contexts, self._tokens_B1, self._memories_SBW = [], [], []

    def _read_prompts(self, model: Any, prompts: Sequence[Sequence[int]], num_tokens: int) -> tuple[_Context, Tensor]:
        longest = max(map(len, prompts))
        num_padding_B1 = torch.tensor([[longest - len(prompt)] for prompt in prompts])
        ids_BT = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        mask_BT = None
        if num_padding_B1.any():
            mask_BT = (torch.arange(longest + num_tokens) >= num_padding_B1).long()
        positions_BT = (torch.arange(longest) - num_padding_B1).clamp(min=0)
        context = _Context(self._new_cache(model, longest + num_tokens), mask_BT, positions_BT[:, :1])
        return context, _read(model, context, ids_BT, positions_BT)

    def _new_cache(self, model: Any, max_length: int) -> Any:
        if self.cache_kind == "static":
            return StaticCache(config=model.config, max_cache_len=max_length)
        return DynamicCache(config=model.config)

    def _choose(self, last_SBD: Sequence[Tensor]) -> Tensor:
        heads = [model.get_output_embeddings() for model in self._models]
        logits_SBV = [head(last_BD) for head, last_BD in zip(heads, last_SBD, strict=True)]
        if self._gate is None:
            fused_BV = logits_SBV[0][:, : self._num_shared_ids]
        else:
            fused_BV = fuse(self._weigh(self._gate, last_SBD), logits_SBV, self._num_shared_ids, self._gate.mixture)
        return fused_BV.argmax(dim=-1, keepdim=True)

    def _weigh(self, gate: Gate, last_SBD: Sequence[Tensor]) -> Tensor:
        """The gate's weights [S, B]; a smoothed one's memories go on to the next token."""
        if gate.kind.smoothed and not self._memories_SBW:
            self._memories_SBW = [last_BD.new_zeros(len(last_BD), gate.width).float() for last_BD in last_SBD]
        memories: Sequence[Tensor | None] = self._memories_SBW or [None] * len(last_SBD)
        told = list(enumerate(zip(last_SBD, memories, strict=True)))
        weights_SB = gate.weights_of(torch.stack([gate.part_of(index, *own) for index, own in told]))
        self._memories_SBW = [gate.remember(index, own, memory) for index, (own, memory) in told if memory is not None]
        return weights_SB


class StaticBatches:
    """Requests in batches of fixed size, in order; the next batch starts when the longest response is complete."""

    def __init__(self, loop: LockstepLoop, requests: Sequence[Request], batch_size: int) -> None:
        self._loop = loop
        self._batches = [list(requests[i : i + batch_size]) for i in range(0, len(requests), batch_size)]
        self._num_tokens = sum(request.num_tokens for request in requests)
        self._num_done = 0

    @property
    def progress(self) -> float:
        """Share of all tokens that are generated; tokens beyond a request's own length do not count."""
        return self._num_done / self._num_tokens

    def step(self) -> None:
        """One step of the batch, or the start of the next one."""
        batch = self._batches[0]
        if self._loop.num_steps == 0:
            self._loop.start(batch)
        else:
            self._loop.step()
        self._num_done += sum(request.num_tokens >= self._loop.num_steps for request in batch)
        if self._loop.num_steps == max(request.num_tokens for request in batch):
            self._batches.pop(0)
            self._loop.stop()


def _load(specialist: SpecialistConfig, dtype: str) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(
        specialist.model,
        revision=specialist.revision,
        dtype=dtype,
        attn_implementation="sdpa",
    )
    return model.eval()


def _read(model: Any, context: _Context, ids_BT: Tensor, positions_BT: Tensor) -> Tensor:
    """Append tokens to every row; the last hidden states [B, D], after the final norm."""
    context.length += ids_BT.shape[1]
    output = model.get_decoder()(
        input_ids=ids_BT,
        attention_mask=None if context.mask_BT is None else context.mask_BT[:, : context.length],
        position_ids=positions_BT,
        past_key_values=context.cache,
        use_cache=True,
    )
    context.next_position_B1 = positions_BT[:, -1:] + 1
    return output.last_hidden_state[:, -1]
