"""The conversations of a run: each instruction's longest one, as a row of training data with its lineage.

Knows the store; does not know what is left out later.
"""

from collections.abc import Iterator

from ultrafuser.gating.synthesis.stages.records import Frozen, Message
from ultrafuser.gating.synthesis.stages.store import Store
from ultrafuser.gating.synthesis.stages.structure import RESPONSES
from ultrafuser.gating.synthesis.stages.tasks import good_items


class Row(Frozen):
    """One conversation as a line of the training format (`gating/data/conversations.py`), and where it comes from."""

    id: str
    """Of the instruction that it began with."""

    domain: str

    messages: tuple[Message, ...]
    """User and assistant in turns."""

    meta_topic: str
    sub_topic: str
    relation: str
    is_complex: bool

    model: str
    """Who wrote its last response."""


_LINEAGE = {"domain", "meta_topic", "sub_topic", "relation", "is_complex", "model"}


def conversations(store: Store, num_turns: int) -> Iterator[Row]:
    """Every conversation once, at its greatest length; `num_turns` is the most that were added to the first."""
    stages = [RESPONSES, *(f"{RESPONSES}_{turn}" for turn in range(1, num_turns + 1))]
    seen: set[str] = set()
    for stage in reversed(stages):
        for record, item in good_items(store, stage):
            if record.root not in seen:
                seen.add(record.root)
                messages = (*record.messages, Message(role="assistant", content=item.text))
                yield Row(id=record.root, messages=messages, **record.model_dump(include=_LINEAGE))
