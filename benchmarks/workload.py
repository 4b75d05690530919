"""What the benchmarks ask for: requests of random tokens, conversations rendered for every specialist, a tiny model."""

import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from ultrafuser.gating.model.fusion import FusedModelInfo, FusionConfig
from ultrafuser.gating.templates import fold_messages

Prompts = list[list[int]]
"""A request's own prompts, one per specialist."""

_TASKS = (
    "Explain how a rainbow forms.",
    "Write a Python function that reverses a linked list.",
    "A train travels 120 km in 1.5 hours. What is its average speed?",
    "List three uses of copper and say why it is suited to each.",
    "Write a SQL query that counts the orders of every customer.",
    "What is 15% of 240? Show the steps.",
    "Summarise the causes of the French Revolution in two sentences.",
    "Write a regular expression that matches an ISO date.",
)
_STYLES = ("", " Answer briefly.", " Explain it to a child.", " Be precise.")


@dataclass(frozen=True)
class Request:
    """One request."""

    prompts: Prompts
    """Token ids, one prompt per specialist."""

    num_tokens: int
    """Length of the response."""

    may_end_early: bool = False
    """Whether EOS ends the response, so that `num_tokens` is only its greatest length."""

    temperature: float = 0.0
    """0 is greedy."""

    seed: int = 0
    """Of the draws, where it is not greedy."""


def random_requests(
    info: FusedModelInfo, prompt_lengths: Sequence[int], num_tokens: Sequence[int], seed: int
) -> list[Request]:
    """Requests whose prompts are random shared ids, every specialist's of the same length but with its own ids.

    Raises:
        ValueError: the two sequences, one entry per request, differ in length.
    """
    rng = random.Random(seed)
    num_specialists = len(info.hidden_sizes)
    return [
        Request([[rng.randrange(info.num_shared_ids) for _ in range(length)] for _ in range(num_specialists)], num)
        for length, num in zip(prompt_lengths, num_tokens, strict=True)
    ]


def conversations(count: int) -> list[list[dict[str, str]]]:
    """`count` different conversations of one user turn.

    Raises:
        ValueError: more than there are.
    """
    texts = [task + style for style in _STYLES for task in _TASKS]
    if count > len(texts):
        raise ValueError(f"there are {len(texts)} conversations, not {count}")
    return [[{"role": "user", "content": text}] for text in texts[:count]]


def render(fusion: FusionConfig, messages: Sequence[Sequence[dict[str, str]]]) -> list[Prompts]:
    """Conversations as the specialists of a materialized fusion read them."""
    rendered: list[Prompts] = [[] for _ in messages]
    for specialist in fusion.specialists:
        tokenizer: Any = AutoTokenizer.from_pretrained(specialist.model, revision=specialist.revision)
        template = tokenizer.get_chat_template(specialist.chat_template)
        for conversation, prompts in zip(messages, rendered, strict=True):
            turns, _ = fold_messages(conversation, None, template)
            text = tokenizer.apply_chat_template(
                turns, chat_template=template, add_generation_prompt=True, tokenize=False
            )
            prompts.append(list(tokenizer.encode(text, add_special_tokens=False)))
    return rendered


@contextmanager
def tiny_fusion() -> Iterator[str]:
    """The fusion file of the tests' tiny random models, which are there while it is used."""
    from tests.fakes import write_tiny_fusion

    with tempfile.TemporaryDirectory() as folder:
        yield str(write_tiny_fusion(Path(folder)))
