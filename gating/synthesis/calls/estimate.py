"""What a run would take: calls by arithmetic, tokens by what calls of the stage took so far, or by rules of thumb.

An upper estimate of the calls: nothing is rejected or dropped. Asks nobody.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean

from ultrafuser.gating.synthesis.calls.budget import CHARACTERS_PER_TOKEN
from ultrafuser.gating.synthesis.settings import Prices
from ultrafuser.gating.synthesis.stages.domain import Domain
from ultrafuser.gating.synthesis.stages.prompt import load_prompt
from ultrafuser.gating.synthesis.stages.store import Store
from ultrafuser.gating.synthesis.stages.structure import (
    COMPLICATIONS,
    INSTRUCTIONS,
    META_TOPICS,
    PER_CALL,
    RELATED,
    RESPONSES,
    SUB_TOPICS,
    Structure,
    response_stage,
    user_stage,
)

TOPIC_TOKENS, NOTE_TOKENS = 8, 40
"""Of names and notes, with their JSON."""


@dataclass(frozen=True)
class StageEstimate:
    """One stage, of all domains."""

    stage: str

    calls: int
    """All, those that are made too."""

    made: int

    prompt_tokens: float
    """Of the calls that are missing."""

    completion_tokens: float
    """Of the calls that are missing."""

    is_measured: bool
    """Whether tokens are means of calls made."""


def estimate(structure: Structure, store: Store | None) -> list[StageEstimate]:
    """All stages; `store` is what a folder holds, None: nothing."""
    estimates = []
    for stage in structure.stages:
        calls = {domain.name: num_calls(structure, domain, stage) for domain in structure.domains}
        measured = _measured(store, stage) if store else {}
        made = len(store.ids(stage)) if store else 0
        total = sum(calls.values())
        share = max(0.0, 1 - made / total) if total else 0.0
        prompt = completion = 0.0
        for domain in structure.domains:
            own = measured.get(domain.name) or _assumed(structure, domain, stage)
            prompt += calls[domain.name] * own[0] * share
            completion += calls[domain.name] * own[1] * share
        estimates.append(StageEstimate(stage, total, made, prompt, completion, bool(measured)))
    return estimates


def num_calls(structure: Structure, domain: Domain, stage: str) -> int:
    """Calls of a stage for one domain."""
    sub_topics = domain.meta_topics * domain.sub_topics
    seeds = sub_topics * domain.instructions
    instructions = seeds * (1 + structure.strong + structure.weak)
    counts = {
        META_TOPICS: 1,
        SUB_TOPICS: domain.meta_topics,
        INSTRUCTIONS: sub_topics * -(-domain.instructions // PER_CALL),
        RELATED: seeds if structure.strong + structure.weak else 0,
        COMPLICATIONS: round(instructions * structure.complex_share),
        RESPONSES: instructions,
    }
    for turn in range(1, structure.turns + 1):
        counts[user_stage(turn)] = counts[response_stage(turn)] = round(instructions * structure.turn_share**turn)
    return counts[stage]


def describe(estimates: list[StageEstimate], prices: Prices) -> Iterator[str]:
    """A table for people."""
    yield f"{'stage':<16}{'calls':>10}{'made':>10}{'prompt tokens':>16}{'completion':>16}{'cost':>12}  tokens"
    totals = [0.0, 0.0]
    for item in estimates:
        tokens = (item.prompt_tokens, item.completion_tokens)
        totals = [total + own for total, own in zip(totals, tokens, strict=True)]
        how = "measured" if item.is_measured else "assumed"
        yield (
            f"{item.stage:<16}{item.calls:>10,}{item.made:>10,}{tokens[0]:>16,.0f}{tokens[1]:>16,.0f}"
            f"{prices.cost(*tokens):>12,.2f}  {how}"
        )
    calls, made = sum(item.calls for item in estimates), sum(item.made for item in estimates)
    yield f"{'all':<16}{calls:>10,}{made:>10,}{totals[0]:>16,.0f}{totals[1]:>16,.0f}{prices.cost(*totals):>12,.2f}"


def _measured(store: Store, stage: str) -> Mapping[str, tuple[float, float]]:
    """Mean tokens of the calls made, by domain."""
    found: dict[str, list[tuple[int, int]]] = {}
    for record in store.records(stage):
        found.setdefault(record.domain, []).append((record.prompt_tokens, record.completion_tokens))
    return {
        name: (fmean(prompt for prompt, _ in calls), fmean(completion for _, completion in calls))
        for name, calls in found.items()
    }


def _assumed(structure: Structure, domain: Domain, stage: str) -> tuple[float, float]:
    """Tokens of one call, from the domain's expectations and the length of the prompt."""
    instruction, response = domain.expected.instruction, domain.expected.response
    exchange = instruction + response
    if stage.startswith(RESPONSES):
        turn = int(stage.rpartition("_")[2]) if stage != RESPONSES else 0
        return len(domain.guidance) / CHARACTERS_PER_TOKEN + instruction + turn * exchange, response
    name = "user_turns" if stage.startswith("user_turns") else stage
    values = {"count": 0, "angles": domain.angles[:PER_CALL], "note": "x" * NOTE_TOKENS * CHARACTERS_PER_TOKEN}
    values |= {"strong": structure.strong, "weak": structure.weak, "instruction": "", "way": "x" * 50, "messages": ()}
    common = {"description": domain.description, "language": domain.language, "limits": domain.limits}
    text = load_prompt(name).render(meta_topic="x" * 20, sub_topic="x" * 20, **common, **values)
    context = {RELATED: instruction, COMPLICATIONS: instruction}.get(stage, 0)
    if name == "user_turns":
        context = int(stage.rpartition("_")[2]) * exchange
    answers = {
        META_TOPICS: domain.meta_topics * TOPIC_TOKENS,
        SUB_TOPICS: domain.sub_topics * (TOPIC_TOKENS + NOTE_TOKENS),
        INSTRUCTIONS: min(PER_CALL, domain.instructions) * instruction,
        RELATED: (structure.strong + structure.weak) * instruction,
    }
    return len(text) / CHARACTERS_PER_TOKEN + context, answers.get(name, 1.5 * instruction)
