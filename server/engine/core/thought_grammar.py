"""A response that thinks before it keeps to a grammar: free up to the end of its thought, held to the grammar behind.

The grammar itself knows where the thought ends, by the rule of `server/engine/shared/thought.py`. So vLLM's manager of
structured output, which would look for it in the canonical prompt, needs no reasoning parser; and draft rows, which it
fills by accepting tokens and rolling them back, are right by themselves. Knows token ids and one grammar.
"""

from copy import copy
from typing import Any

import torch
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar

from ultrafuser.server.engine.shared.thought import Thought, ThoughtReader

_MAX_ROLLBACK = 64
"""Most tokens that are taken back at once: those of a step's drafts are far fewer."""


class ThoughtGrammar(StructuredOutputGrammar):
    """A grammar behind a thought."""

    def __init__(self, grammar: StructuredOutputGrammar, thought: Thought, eos_token_ids: frozenset[int]) -> None:
        """`grammar` holds the answer. A thought cannot be ended by `eos_token_ids`: there would be no answer."""
        self._grammar = grammar
        self._eos_token_ids = eos_token_ids
        self._reader = ThoughtReader(thought)
        self._before: list[ThoughtReader] = []
        """The reader as it was before each of the thought's last tokens, as many as may be taken back."""

        self._num_answer = 0
        """How many of the answer were."""

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        """Go on by these tokens; False at the first that the grammar does not let through."""
        num_thought = self._split(tokens)
        thought, answer = tokens[:num_thought], tokens[num_thought:]
        if answer and not self._grammar.accept_tokens(request_id, answer):
            return False
        for token_id in [*thought, *([] if self._num_answer else answer[:1])]:  # the answer's first says all
            self._before.append(copy(self._reader))
            self._reader.read(token_id)
        del self._before[:-_MAX_ROLLBACK]
        self._num_answer += len(answer)
        return True

    def validate_tokens(self, tokens: list[int]) -> list[int]:
        """The tokens up to the first that would not be let through."""
        num_thought = self._split(tokens)
        thought = tokens[:num_thought]
        refused = next((index for index, token_id in enumerate(thought) if token_id in self._eos_token_ids), None)
        if refused is not None:
            return thought[:refused]
        return thought + (self._grammar.validate_tokens(tokens[num_thought:]) if tokens[num_thought:] else [])

    def rollback(self, num_tokens: int) -> None:
        """Take back the last tokens."""
        num_answer = min(num_tokens, self._num_answer)
        if num_answer:
            self._grammar.rollback(num_answer)
        self._num_answer -= num_answer
        is_first_back = num_answer > 0 and not self._num_answer
        for _ in range(num_tokens - num_answer + is_first_back):
            self._reader = self._before.pop()

    def fill_bitmask(self, bitmask: torch.Tensor, batch_index: int) -> None:
        """Which tokens may come next, as bits of `bitmask[batch_index]` (int32)."""
        ends = self._reader.thought.implicit_ends
        if not self._reader.is_in_thought or ends:
            self._grammar.fill_bitmask(bitmask, batch_index)
        if self._reader.is_in_thought:
            # What would be the answer's first token has to be one that the answer may begin with.
            refused = [token_id for token_id in ends if not _is_set(bitmask, batch_index, token_id)]
            bitmask[batch_index].fill_(-1)
            for token_id in (*self._eos_token_ids, *refused):
                _set(bitmask, batch_index, token_id, is_allowed=False)
        elif self._reader.may_open:
            _set(bitmask, batch_index, self._reader.thought.start, is_allowed=True)

    def is_terminated(self) -> bool:
        """Whether the answer is complete."""
        return self._grammar.is_terminated()

    def reset(self) -> None:
        """Begin anew."""
        self._grammar.reset()
        self._reader, self._before, self._num_answer = ThoughtReader(self._reader.thought), [], 0

    def _split(self, tokens: list[int]) -> int:
        """How many of the next tokens are the thought's."""
        reader = copy(self._reader)
        return next((index for index, token_id in enumerate(tokens) if not reader.read(token_id)), len(tokens))


def _is_set(bitmask: torch.Tensor, batch_index: int, token_id: int) -> bool:
    word, bit = divmod(token_id, 32)
    return bool(int(bitmask[batch_index, word]) >> bit & 1)


def _set(bitmask: torch.Tensor, batch_index: int, token_id: int, *, is_allowed: bool) -> None:
    word, bit = divmod(token_id, 32)
    value = int(bitmask[batch_index, word]) & 0xFFFFFFFF
    value = value | (1 << bit) if is_allowed else value & ~(1 << bit)
    bitmask[batch_index, word] = value - (1 << 32) if value >= 1 << 31 else value


def behind_thought(grammar: Any, thought: Thought | None, eos_token_ids: tuple[int, ...]) -> Any:
    """The grammar of a request's whole response, thought included."""
    return grammar if thought is None else ThoughtGrammar(grammar, thought, frozenset(eos_token_ids))
