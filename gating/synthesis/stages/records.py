"""What is kept of every call that made something, and of every call that did not; ids and seeds out of lineage.

An id is a digest of where a thing comes from: its stage, the version of its prompt, its parent, its place. So the same
run has the same ids in whatever order calls end, and a call that was made is known without looking at its text. Knows
no files and no prompts.
"""

import hashlib
import json
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

NumTokens = Annotated[int, Field(ge=0, lt=2**53)]
UNPARSABLE, REFUSED_BY_SERVER, FAILED = "unparsable", "refused_by_server", "failed"


class Frozen(BaseModel):
    """Part of a file that is read or written; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Message(Frozen):
    """One message of a conversation."""

    role: str
    """`user` or `assistant`."""

    content: str


class Item(Frozen):
    """One thing that a call made: a topic, an instruction, a message."""

    id: str
    """Digest of the call's id and the place among its items."""

    text: str
    """The topic's name, the instruction, the message."""

    note: str = ""
    """Of a sub-topic: what belongs to it."""

    relation: str = ""
    """Of an instruction made from another: `strong` or `weak`."""

    reject: str = ""
    """Why nothing is made of it; empty: it is good."""


class Record(Frozen):
    """One call whose answer could be used; a line of a shard. Tokens are those of all tries."""

    id: str
    """Digest of the lineage."""

    stage: str
    domain: str
    meta_topic: str = ""
    sub_topic: str = ""

    parent: str
    """Id of the item it was made from."""

    root: str = ""
    """From the responses on: id of the instruction that the conversation began with."""

    relation: str = ""
    """From the responses on: how that instruction was made, as in `Item`."""

    is_complex: bool = False
    """From the responses on: whether it was rewritten to be more complex."""

    prompt: str
    """Name and version of the prompt."""

    model: str
    """Who was asked."""

    seed: int
    """Sent with the call."""

    messages: tuple[Message, ...] = ()
    """From the responses on: the conversation that was continued."""

    items: tuple[Item, ...]
    """What came of it; a list that was too short is filled with rejected items."""

    prompt_tokens: NumTokens
    completion_tokens: NumTokens

    time: float
    """When it came, in seconds since 1970."""


class Miss(Frozen):
    """One call that made nothing; a line of `misses.jsonl`. What a `Record` has too is the same here."""

    id: str
    stage: str
    domain: str

    reason: str
    """`unparsable`, `truncated`, `refusal`, `refused_by_server`, `failed`, or what a check is called."""

    detail: str
    """What was said or sent, for people; cut to 500 characters."""

    is_final: bool
    """Whether the answer was rejected; else the same call may succeed, and the next run makes it."""

    prompt_tokens: NumTokens
    completion_tokens: NumTokens
    time: float


def identify(*lineage: str | int) -> str:
    """A digest, 16 hexadecimal digits: among a million ids, two are equal with a probability of 3e-8."""
    return hashlib.sha256(json.dumps(lineage).encode()).hexdigest()[:16]


def seed_of(identity: str) -> int:
    """What is sent as a call's seed: 31 bits out of its id."""
    return int(identify("seed", identity), 16) >> 33


def draw(identity: str, purpose: str) -> float:
    """A number from 0 to 1 that belongs to an id: below a share of p, the id is in the share. Not random twice."""
    return int(identify(purpose, identity), 16) / 2**64
