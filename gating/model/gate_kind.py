"""The kinds of gate: what a score looks at, and how what it weighs is mixed.

The paper's gate scores each specialist by its own state and mixes logits. Four changes of it stand each for itself and
go together; a kind is the set of those that a gate has, written as their names joined by "+".
"""

from dataclasses import dataclass, fields

from ultrafuser.gating.errors import GateError

PAPER = "paper"


@dataclass(frozen=True)
class GateKind:
    """Which changes a gate has; none is the paper's gate. `parse` reads what `str` writes."""

    joint: bool = False
    """Every score looks at the states of all specialists (as the router of FusionRoute, arXiv 2601.05106)."""

    probabilities: bool = False
    """Distributions over the shared ids are mixed instead of logits (a mixture instead of a product of experts)."""

    scaled: bool = False
    """Each specialist has a learned temperature of its logits and a learned bias of its score."""

    smoothed: bool = False
    """A score also looks at the exponential mean of the response's earlier states."""

    @classmethod
    def parse(cls, text: str) -> "GateKind":
        """Of `paper`, or of changes joined by "+", each once, in any order.

        Raises:
            GateError: another name, a name twice, or `paper` with a change.
        """
        names = text.split("+")
        if names == [PAPER]:
            return cls()
        if not set(names) <= set(CHANGES) or len(set(names)) < len(names):
            raise GateError(f"unknown gate kind {text!r}; use {PAPER}, or one or more of {', '.join(CHANGES)}, as a+b")
        return cls(**dict.fromkeys(names, True))

    def __str__(self) -> str:
        return "+".join(name for name in CHANGES if getattr(self, name)) or PAPER


CHANGES = tuple(field.name for field in fields(GateKind))
