"""Statistics of a data set as in the paper's Table 15: conversations, topics, and mean length, by domain."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ultrafuser.gating.synthesis.dataset.training_rows import Row


@dataclass(frozen=True)
class Counter:
    """Measures texts."""

    unit: str
    """`tokens` or `words`."""

    count: Callable[[str], int]


@dataclass
class _Domain:
    rows: int = 0
    complex_rows: int = 0
    related_rows: int = 0
    turns: int = 0
    length: int = 0
    response_length: int = 0
    meta_topics: set[str] = field(default_factory=set)
    sub_topics: set[tuple[str, str]] = field(default_factory=set)


class Statistics:
    """Of the rows added so far."""

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self._domains: dict[str, _Domain] = {}

    @property
    def num_rows(self) -> int:
        return sum(own.rows for own in self._domains.values())

    def add(self, row: Row) -> None:
        own = self._domains.setdefault(row.domain, _Domain())
        lengths = [(message.role, self._counter.count(message.content)) for message in row.messages]
        own.rows += 1
        own.complex_rows += row.is_complex
        own.related_rows += bool(row.relation)
        own.turns += len(row.messages) // 2
        own.length += sum(length for _, length in lengths)
        own.response_length += sum(length for role, length in lengths if role == "assistant")
        own.meta_topics.add(row.meta_topic)
        own.sub_topics.add((row.meta_topic, row.sub_topic))

    def as_json(self) -> dict[str, dict[str, Any]]:
        unit = self._counter.unit
        return {
            name: {
                "conversations": own.rows,
                "meta_topics": len(own.meta_topics),
                "sub_topics": len(own.sub_topics),
                f"mean_{unit}": own.length / own.rows,
                f"mean_response_{unit}": own.response_length / own.rows,
                "mean_turns": own.turns / own.rows,
                "complex_share": own.complex_rows / own.rows,
                "related_share": own.related_rows / own.rows,
            }
            for name, own in sorted(self._domains.items())
        }

    def table(self) -> str:
        """Markdown, a line for each domain."""
        unit = self._counter.unit
        names = ["domain", "conversations", "meta-topics", "sub-topics", f"mean {unit}", "of them in responses"]
        lines = [[*names, "mean turns", "made more complex"], ["---", *["---:"] * 7]]
        for name, own in sorted(self._domains.items()):
            means = [own.length / own.rows, own.response_length / own.rows]
            counts = [own.rows, len(own.meta_topics), len(own.sub_topics)]
            shares = [f"{own.turns / own.rows:.2f}", f"{100 * own.complex_rows / own.rows:.0f} %"]
            lines.append([name, *(f"{count:,}" for count in counts), *(f"{mean:.0f}" for mean in means), *shares])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def load_counter(tokenizer: str | None) -> Counter:
    """Tokens of a tokenizer (folder or hub id), without special ones; words if there is none."""
    if tokenizer is None:
        return Counter("words", lambda text: len(text.split()))
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    return Counter("tokens", lambda text: len(loaded(text, add_special_tokens=False)["input_ids"]))
