"""How a run is laid out: domains, how many of what, which stages. Fixed for a folder; ids follow from it.

Knows no calls. The paper's six stages ("UltraChat 2") are here seven kinds of call: instructions come in two.
"""

from dataclasses import dataclass
from typing import Any

from ultrafuser.gating.synthesis.stages.domain import Domain, digest
from ultrafuser.gating.synthesis.stages.prompt import load_prompt, prompt_names
from ultrafuser.gating.synthesis.stages.records import identify

META_TOPICS, SUB_TOPICS, INSTRUCTIONS = "meta_topics", "sub_topics", "instructions"
RELATED, COMPLICATIONS, RESPONSES = "related", "complications", "responses"
PER_CALL = 10
"""Most instructions that one call is asked for."""

FROM_SETTINGS = ("strong", "weak", "complex_share", "turns", "turn_share", "seed")
"""What a structure takes from the settings as it is."""


@dataclass(frozen=True)
class Structure:
    """What is to be made."""

    domains: tuple[Domain, ...]
    """At least one; counts are the domains'."""

    strong: int
    """Instructions strongly related to each."""

    weak: int
    """Weakly related ones."""

    complex_share: float
    """Share of the instructions that are rewritten to be more complex."""

    turns: int
    """Most further turns of a conversation."""

    turn_share: float
    """Share of the conversations that get another turn, each time."""

    seed: int

    @property
    def stages(self) -> tuple[str, ...]:
        """In the order in which they are made."""
        further = [name for turn in range(1, self.turns + 1) for name in (user_stage(turn), response_stage(turn))]
        return (META_TOPICS, SUB_TOPICS, INSTRUCTIONS, RELATED, COMPLICATIONS, RESPONSES, *further)

    def domain(self, name: str) -> Domain:
        return next(domain for domain in self.domains if domain.name == name)

    def root(self, domain: Domain) -> str:
        """Id that a domain's meta-topics come from."""
        return identify("domain", domain.name, self.seed)

    def as_json(self) -> dict[str, Any]:
        """What must be the same for the same folder."""
        own = {name: getattr(self, name) for name in FROM_SETTINGS}
        prompts = {f"prompt {name}": load_prompt(name).identity for name in prompt_names()}
        domains = {f"domain {domain.name}": digest(domain) for domain in self.domains}
        return {"domains": sorted(domain.name for domain in self.domains), **own, **prompts, **domains}


def user_stage(turn: int) -> str:
    """Name of the stage in which a user is simulated, for the turn after `turn`, from 1."""
    return f"user_turns_{turn}"


def response_stage(turn: int) -> str:
    """Name of the stage that answers; 0 is the first response's."""
    return f"responses_{turn}" if turn else RESPONSES
