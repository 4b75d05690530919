"""Budgets go with their requests through the slots of a batch."""

from typing import Any

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality

from ultrafuser.server.engine.shared.thought import THOUGHT, Thought
from ultrafuser.server.engine.worker.thinking_budget import ThinkingBudget

END = 6


def params(budget: int | None) -> SamplingParams:
    """Of a request that may think so long."""
    return SamplingParams(extra_args={THOUGHT: Thought("open", 5, END, (), budget).as_plain()})


def ended(budgets: ThinkingBudget, outputs: list[list[int]]) -> list[int]:
    """The slots that are left the end marker alone."""
    budgets.update_state(outputs, None, repeat_indices=None)
    logits = budgets.apply_to_logits(torch.ones(len(outputs), 8), False, None)
    alone = [slot for slot, row in enumerate(logits) if row.isfinite().nonzero().flatten().tolist() == [END]]
    assert all(logits[slot].isfinite().all() for slot in range(len(outputs)) if slot not in alone)
    return alone


def update(**changes: Any) -> BatchUpdate:
    """What has changed in a batch."""
    return BatchUpdate(**{"batch_size": 4, "removed": [], "added": [], "moved": [], **changes})


def test_a_budget_follows_its_request() -> None:
    budgets = ThinkingBudget()
    outputs: list[list[int]] = [[], [], []]
    added = [(slot, params(budget), None, outputs[slot]) for slot, budget in enumerate([2, None, 0])]
    budgets.sync_batch(update(added=added))
    assert budgets.has_tracked_requests()
    assert ended(budgets, outputs) == [2]
    for own in outputs:
        own += [1, 2]
    assert ended(budgets, outputs) == [0, 2]
    outputs[0], outputs[1] = outputs[1], outputs[0]
    budgets.sync_batch(update(moved=[(0, 1, MoveDirectionality.SWAP)]))
    assert ended(budgets, outputs) == [1, 2]
    outputs[1], outputs[2] = outputs[2], outputs[1]
    budgets.sync_batch(update(moved=[(1, 2, MoveDirectionality.SWAP)]))
    outputs[2].append(END)  # of the request that came first
    assert ended(budgets, outputs) == [1]
    budgets.sync_batch(update(removed=[1], moved=[(2, 1, MoveDirectionality.UNIDIRECTIONAL)]))
    assert ended(budgets, [outputs[0], outputs[2]]) == []
    budgets.sync_batch(update(added=[(1, SamplingParams(), None, [])]))
    assert not budgets.has_tracked_requests()


def test_a_token_that_is_still_on_the_device_is_not_read() -> None:
    budgets = ThinkingBudget()
    budgets.sync_batch(update(added=[(0, params(1), None, [])]))
    assert ended(budgets, [[-1]]) == []
    assert ended(budgets, [[3]]) == [0]
