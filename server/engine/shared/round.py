"""What became of a request's drafts in one step, and why there were none: for whoever counts it.

A round is a step that goes on with a response: after its first token, and not where a preempted request is read anew.
A response that is given has none: its drafts are its own tokens. Knows names and numbers.
"""

from enum import StrEnum
from typing import NamedTuple


class Undrafted(StrEnum):
    """Why a request had no draft in a round."""

    UNPAID = "unpaid"
    """By what passes cost and how often drafts were right, none is quickest."""

    UNMEASURED = "unmeasured"
    """What a step costs is not known yet."""

    NOTHING_FOUND = "nothing_found"
    """The drafter had no guess: nothing like the last tokens was there before."""

    LAST_TOKEN = "last_token"
    """One more token is all that the request may be given."""

    CONTEXT = "context"
    """Near the end of the context a specialist has no room for drafts."""

    CUT = "cut"
    """Drafts were made, but the grammar refused the first, or the step had no room for any."""


class Decision(NamedTuple):
    """What was done for a request between two steps."""

    drafter: str | None
    """Who drafted; None if there is no draft."""

    undrafted: Undrafted | None = None
    """Why there is none."""


class Round(NamedTuple):
    """One request in one step."""

    first_token: int
    """Place of its first token among those of the step."""

    drafter: str | None
    """Who drafted what was verified; None if nothing was."""

    num_drafts: int
    """How many drafts were verified."""

    num_accepted: int
    """How many of its tokens had been drafted."""

    num_tokens: int
    """How many tokens it was given."""

    undrafted: str | None
    """Why there was no draft."""
