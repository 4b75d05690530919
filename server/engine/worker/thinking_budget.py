"""The most tokens that a response may think: then the sampler is left nothing but the marker that ends the thought.

Sits in the place that vLLM's sampler has for such a thing, behind masks and penalties. vLLM's own counts by the
leader's prompt and keeps count of drafts by itself; here the response's own tokens decide, by the rule of
`server/engine/shared/thought.py`, and drafts need no word: every draw sees the tokens before it as handed out. Knows
slots of the leader's batch, no prompts.

Shapes: R rows of logits, one for each slot; V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from ultrafuser.server.engine.shared.thought import ThoughtReader, thought_of

_NOT_HERE_YET = -1
"""What vLLM writes for a token that is still on the device."""


class ThinkingBudget:
    """Stands in the place of vLLM's `ThinkingBudgetStateHolder`."""

    def __init__(self) -> None:
        self._slots: dict[int, ThoughtReader] = {}
        """Of the requests that may still think."""

    def has_tracked_requests(self) -> bool:
        """Whether a request of the batch has a budget, and may still think."""
        return bool(self._slots)

    def sync_batch(self, update: BatchUpdate | None) -> None:
        """Requests have come, left, or changed their slots."""
        if update is None:
            return
        for slot in update.removed:
            self._slots.pop(slot, None)
        for slot, params, _, _ in update.added:
            thought = thought_of(params)
            self._slots.pop(slot, None)
            if thought is not None and thought.budget is not None and thought.opening != "closed":
                self._slots[slot] = ThoughtReader(thought)
        for source, target, direction in update.moved:
            moved, other = self._slots.pop(source, None), self._slots.pop(target, None)
            if moved is not None:
                self._slots[target] = moved
            if other is not None and direction is MoveDirectionality.SWAP:
                self._slots[source] = other

    def update_state(self, output_token_ids: Sequence[Sequence[int]], *_: Any, **__: Any) -> None:
        """Read what was handed out since the last draw."""
        for slot, reader in list(self._slots.items()):
            for token_id in output_token_ids[slot][reader.num_read :]:
                if token_id == _NOT_HERE_YET:
                    break
                reader.read(token_id)
            if reader.is_over:  # for good: the whole batch would be slower for it
                del self._slots[slot]

    def apply_to_logits(self, logits_RV: Tensor, *_: Any) -> Tensor:
        """The logits, in which those whose budget is spent have the end marker alone."""
        for slot, reader in self._slots.items():
            if reader.is_spent:
                logits_RV[slot] = float("-inf")
                logits_RV[slot, reader.thought.end] = 0.0
        return logits_RV


def keep_budgets_in(leader: GPUModelRunner) -> None:
    """Give the leader's batch ours."""
    batch = leader.input_batch
    batch.thinking_budget_state_holder = ThinkingBudget()
    batch.sampling_metadata = batch._make_sampling_metadata()
