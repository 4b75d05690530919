"""The fused model as a causal language model of raw text, which is the same for all specialists.

So Transformers generate with it, with caches, beams and all, and other trainers train it. What a conversation is, with
a sequence for each specialist, is in `gating/model/reference.py`.

Shape suffixes: S specialists, B rows, T positions (left-padded), R response tokens, D hidden size, V shared vocabulary,
W width of the gate.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.utils import ModelOutput

from ultrafuser.gating.model.gate import Gate
from ultrafuser.gating.model.responses import last_hidden_states


class FusedCache(Cache):
    """Keys and values of all specialists' layers, and what a smoothed gate has of the text so far.

    Each specialist writes to its own part; whatever Transformers does to a cache it does to all layers. Every part has
    seen the same tokens, so that the first layer's length is that of all.
    """

    def __init__(self, configs: Sequence[PreTrainedConfig]) -> None:
        """`configs` are the specialists' own."""
        self.parts = [DynamicCache(config=config) for config in configs]
        self.memories: list[Tensor] = []
        """S tensors [B, W]; none yet, or none at all if the gate looks at no earlier states."""
        super().__init__(layers=[layer for part in self.parts for layer in part.layers])

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        self.memories = [memory_BW[beam_idx] for memory_BW in self.memories]

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.memories = [memory_BW[indices] for memory_BW in self.memories]

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.memories = [memory_BW.repeat_interleave(repeats, dim=0) for memory_BW in self.memories]

    def crop(self, tokens_to_remove: int) -> None:
        if self.memories:
            raise ValueError("past_key_values: a smoothed gate does not forget; generate without an assistant model")
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        super().reset()
        self.memories = []


@dataclass
class FusedOutput(ModelOutput):
    """What `UltraFuserForCausalLM.forward` returns."""

    loss: Tensor | None = None
    """Cross-entropy of the fused logits, mean over all labelled response tokens of the batch."""

    logits: Tensor | None = None
    """float32 [B, R, V]: entry r predicts the r-th response token; rows beyond a request's last one are garbage. Of raw
    text [B, T, V]: entry t predicts what follows token t."""

    gate_weights: Tensor | None = None
    """float32 [S, B, R], summing to one over S."""

    labels: Tensor | None = None
    """The response tokens [B, R] that the loss was taken on; -100 where there is none."""

    past_key_values: FusedCache | None = None
    """Of raw text: what was read, to go on from."""


class RawText(GenerationMixin):
    """What a fused model does with raw text. Mixed into a Transformers model that has the attributes named here."""

    config: Any
    specialists: Any
    fusion_gate: Gate | None
    loss_function: Any

    def _weights(self, hidden_states: Sequence[Tensor]) -> Tensor:
        """The model's own."""
        raise NotImplementedError

    def _mix(self, weights_S: Tensor, hidden_states: Sequence[Tensor]) -> Tensor:
        """The model's own."""
        raise NotImplementedError

    def read_text(
        self,
        input_ids_BT: Tensor,
        attention_mask: Any = None,
        labels: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        past_key_values: FusedCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **loss: Any,
    ) -> FusedOutput:
        """The fused model as a causal language model of raw text, the same tokens for every specialist.

        A smoothed gate takes the text for one response, from its first token on.

        Args:
            input_ids_BT: padded on the left, if at all.
            attention_mask: [B, cached + T], zero at the padding; default: no padding.
            labels: [B, T], the tokens themselves; each is predicted by the position before it, -100 is left out.
            position_ids: only those that the mask gives anyway.
            past_key_values: what was read before; extended in place.
            use_cache: make one if there is none.
            logits_to_keep: so many last positions' logits, 0 for all; or which.
            loss: for Transformers' loss, such as `num_items_in_batch`.

        Raises:
            ValueError: a token outside the shared vocabulary, a mask or positions that do not fit, another cache.
        """
        if past_key_values is not None and not isinstance(past_key_values, FusedCache):
            raise ValueError(f"past_key_values: need a FusedCache, got {type(past_key_values).__name__}")
        for name, ids in (("input_ids", input_ids_BT), ("labels", labels)):
            if ids is not None and int(ids.max()) >= self.config.num_shared_ids:
                raise ValueError(f"{name}: {int(ids.max())} is not one of the {self.config.num_shared_ids} shared ids")
        cache = FusedCache(self._own_configs()) if use_cache and past_key_values is None else past_key_values
        mask_BT = text_mask(input_ids_BT, attention_mask, position_ids, cache)
        parts: Sequence[Cache | None] = cache.parts if cache is not None else [None] * len(self.specialists)
        hidden_states = [
            last_hidden_states(specialist, input_ids_BT, mask_BT, part)
            for specialist, part in zip(self.specialists, parts, strict=True)
        ]
        weights_SBT = self._text_weights(hidden_states, mask_BT[:, -input_ids_BT.shape[1] :], cache)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BTV = self._mix(weights_SBT[:, :, kept], [hidden_BTD[:, kept] for hidden_BTD in hidden_states])
        total = None
        if labels is not None:
            total = self.loss_function(logits_BTV, labels, self.config.num_shared_ids, **loss)
        return FusedOutput(loss=total, logits=logits_BTV, gate_weights=weights_SBT, past_key_values=cache)

    def _own_configs(self) -> list[PreTrainedConfig]:
        return [specialist.config for specialist in self.specialists]

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *_: Any, **__: Any
    ) -> Any:
        """What `generate` begins with; Transformers' own cache is of one model."""
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation: {generation_config.cache_implementation!r} is of one model; leave it"
            )
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache:
            model_kwargs["past_key_values"] = FusedCache(self._own_configs())

    def _text_weights(self, hidden_states: Sequence[Tensor], mask_BT: Tensor, cache: FusedCache | None) -> Tensor:
        """Gate weights [S, B, T] at a text's next tokens; a smoothed gate goes through them one by one."""
        gate = self.fusion_gate
        if gate is None or not gate.kind.smoothed:
            return self._weights(hidden_states)
        memories = cache.memories if cache is not None else []
        memories = memories or [own_BTD.new_zeros(len(own_BTD), gate.width).float() for own_BTD in hidden_states]
        weights = []
        for position, is_real_B in enumerate(mask_BT.bool().unbind(dim=1)):
            states = [own_BTD[:, position] for own_BTD in hidden_states]
            told = list(enumerate(zip(states, memories, strict=True)))
            weights.append(gate.weights_of(torch.stack([gate.part_of(index, *own) for index, own in told])))
            memories = [gate.remember(index, *own).where(is_real_B[:, None], own[1]) for index, own in told]
        if cache is not None:
            cache.memories = memories
        return torch.stack(weights, dim=-1)


def text_mask(ids_BT: Tensor, mask: Tensor | None, position_ids: Tensor | None, cache: FusedCache | None) -> Tensor:
    """The attention mask [B, cached + T] of a text's next T tokens, behind those that the cache has.

    Raises:
        ValueError: the mask does not cover cached and new tokens; positions other than those that the mask gives, such
            as those of several texts in one row.
    """
    num_cached = cache.get_seq_length() if cache is not None else 0
    num_rows, num_new = ids_BT.shape
    wanted = (num_rows, num_cached + num_new)
    mask_BT = torch.ones(wanted, dtype=torch.long, device=ids_BT.device) if mask is None else mask
    if tuple(mask_BT.shape) != wanted:
        raise ValueError(
            f"attention_mask: is {tuple(mask_BT.shape)}, need {wanted}: {num_cached} cached and {num_new} new tokens"
        )
    if position_ids is not None:
        own_BT = (mask_BT.long().cumsum(dim=-1) - 1).clamp(min=0)[:, -num_new:]
        is_real_BT = mask_BT[:, -num_new:].bool()
        if not torch.equal(position_ids.expand_as(own_BT)[is_real_BT], own_BT[is_real_BT]):
            raise ValueError(
                "position_ids: must count the tokens of the row; for texts packed into one row attention would cross"
            )
    return mask_BT
