"""What a row of logits is: one position of one request in one step."""

from typing import NamedTuple


class Row(NamedTuple):
    """A decode step has one row a request; a step that verifies drafts has one more behind each draft."""

    request: str
    """The request's id."""

    position: int
    """Which token of the response follows, from 0: the same for all specialists, whose prompts differ in length."""

    is_draft: bool
    """Whether the last token that was read is a draft: what follows counts only if no draft was wrong."""

    slot: int
    """The request's own place in the batch of the runner that computed the row."""
