"""The conversations of a run: each instruction's longest one, as a row of training data with its lineage.

Knows the store; does not know what is left out later.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gating.synthesis.stages.records import Message
from gating.synthesis.stages.store import Store
from gating.synthesis.stages.structure import RESPONSES
from gating.synthesis.stages.tasks import good_items


@dataclass(frozen=True)
class Row:
    """One conversation."""

    id: str
    """Of the instruction that it began with."""

    domain: str
    """Its domain."""

    meta_topic: str
    """Name."""

    sub_topic: str
    """Name."""

    relation: str
    """As in `Item`."""

    is_complex: bool
    """As in `Record`."""

    model: str
    """Who wrote its last response."""

    messages: tuple[Message, ...]
    """User and assistant in turns."""

    def as_json(self) -> dict[str, Any]:
        """A line of the training format (`gating/data/conversations.py`), and where it comes from."""
        return {
            "id": self.id,
            "domain": self.domain,
            "messages": [message.model_dump() for message in self.messages],
            "meta_topic": self.meta_topic,
            "sub_topic": self.sub_topic,
            "relation": self.relation,
            "is_complex": self.is_complex,
            "model": self.model,
        }


def conversations(store: Store, num_turns: int) -> Iterator[Row]:
    """Every conversation once, at its greatest length; `num_turns` is the most that were added to the first."""
    stages = [RESPONSES, *(f"{RESPONSES}_{turn}" for turn in range(1, num_turns + 1))]
    seen: set[str] = set()
    for stage in reversed(stages):
        for record, item in good_items(store, stage):
            if record.root not in seen:
                seen.add(record.root)
                yield Row(
                    id=record.root,
                    domain=record.domain,
                    meta_topic=record.meta_topic,
                    sub_topic=record.sub_topic,
                    relation=record.relation,
                    is_complex=record.is_complex,
                    model=record.model,
                    messages=(*record.messages, Message(role="assistant", content=item.text)),
                )
