"""The calls of every stage, out of what the stages before have made. Pure: asks nobody, decides nothing by chance.

A stage's calls do not depend on the order in which those before ended; which calls there are follows from ids, and
what they say from the items. Knows structure, prompts and schemas; does not know how calls are made or kept.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from ultrafuser.gating.synthesis.stages.prompt import Prompt, load_prompt
from ultrafuser.gating.synthesis.stages.records import FAILED, Item, Message, Record, draw, identify
from ultrafuser.gating.synthesis.stages.response_schemas import (
    instruction_schema,
    instructions_schema,
    message_schema,
    related_schema,
    sub_topics_schema,
    topics_schema,
)
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
from ultrafuser.gating.synthesis.stages.task import Task

WAYS_TO_COMPLICATE = (
    "adding a condition or a constraint that the answer has to meet",
    "asking for reasons, proofs or tests beside the result",
    "putting a concrete and less common case in the place of the general one",
    "joining it with a second task that needs the result of the first",
    "making it need several steps of thought where one was enough",
)
WAYS_TO_GO_ON = (
    "ask for a part of the answer to be explained in more depth",
    "change one of the conditions and ask what follows",
    "ask for an example, or for another one",
    "doubt a point of the answer, and give a reason",
    "ask for the next step that follows from it",
)


class Tasks:
    """The calls of all stages of a structure."""

    def __init__(self, structure: Structure) -> None:
        self._structure = structure

    def of(self, stage: str, store: Store, dropped: Mapping[str, str]) -> Iterator[Task]:
        """A stage's calls, those that are made already too.

        Args:
            stage: one of the structure's.
            store: all stages before it are as complete as they get.
            dropped: ids of instructions of which nothing more is made.
        """
        early: dict[str, Callable[[Store], Iterator[Task]]] = {
            META_TOPICS: self._meta_topics,
            SUB_TOPICS: self._sub_topics,
            INSTRUCTIONS: self._instructions,
            RELATED: self._related,
            COMPLICATIONS: partial(self._complications, dropped=dropped),
            RESPONSES: partial(self._responses, dropped=dropped),
        }
        if stage in early:
            return early[stage](store)
        turn = int(stage.rpartition("_")[2])
        return self._user_turns(store, turn) if stage == user_stage(turn) else self._further_responses(store, turn)

    def _meta_topics(self, store: Store) -> Iterator[Task]:
        prompt = load_prompt(META_TOPICS)
        for domain in self._structure.domains:
            schema = topics_schema(domain.meta_topics, domain.limits)
            root, values = self._structure.root(domain), {"count": domain.meta_topics}
            identity = identify(META_TOPICS, prompt.identity, root)
            yield Task(identity, META_TOPICS, domain, parent=root, prompt=prompt, values=values, schema=schema)

    def _sub_topics(self, store: Store) -> Iterator[Task]:
        prompt = load_prompt(SUB_TOPICS)
        for record, topic in good_items(store, META_TOPICS):
            domain = self._structure.domain(record.domain)
            schema = sub_topics_schema(domain.sub_topics, domain.limits)
            own = {"meta_topic": topic.text, "values": {"count": domain.sub_topics}, "schema": schema}
            yield self._made_from(record, topic, SUB_TOPICS, prompt, **own)

    def _instructions(self, store: Store) -> Iterator[Task]:
        prompt = load_prompt(INSTRUCTIONS)
        for record, topic in good_items(store, SUB_TOPICS):
            domain = self._structure.domain(record.domain)
            for call, begin in enumerate(range(0, domain.instructions, PER_CALL)):
                count = min(PER_CALL, domain.instructions - begin)
                identity = identify(INSTRUCTIONS, prompt.identity, topic.id, call)
                yield self._made_from(
                    record,
                    topic,
                    INSTRUCTIONS,
                    prompt,
                    id=identity,
                    sub_topic=topic.text,
                    values={"count": count, "note": topic.note, "angles": _choose(domain.angles, identity, count)},
                    schema=instructions_schema(count, domain.limits),
                )

    def _related(self, store: Store) -> Iterator[Task]:
        prompt, strong, weak = load_prompt(RELATED), self._structure.strong, self._structure.weak
        if not strong + weak:
            return
        for record, item in good_items(store, INSTRUCTIONS):
            domain = self._structure.domain(record.domain)
            yield self._made_from(
                record,
                item,
                RELATED,
                prompt,
                values={"strong": strong, "weak": weak, "instruction": item.text},
                schema=related_schema(strong, weak, domain.limits),
            )

    def _complications(self, store: Store, dropped: Mapping[str, str]) -> Iterator[Task]:
        prompt = load_prompt(COMPLICATIONS)
        for record, item in all_instructions(store):
            if item.id in dropped or not self._is_complicated(item):
                continue
            domain = self._structure.domain(record.domain)
            (way,) = _choose(WAYS_TO_COMPLICATE, item.id, 1)
            own = {"values": {"way": way, "instruction": item.text}, "schema": instruction_schema(domain.limits)}
            yield self._made_from(record, item, COMPLICATIONS, prompt, **own)

    def _responses(self, store: Store, dropped: Mapping[str, str]) -> Iterator[Task]:
        complex_ones = {record.parent: item.text for record, item in good_items(store, COMPLICATIONS)}
        rejected = {record.parent for record in store.records(COMPLICATIONS)} - complex_ones.keys()
        for record, item in all_instructions(store):
            is_complex = item.id in complex_ones
            if item.id in dropped:
                continue
            if self._is_complicated(item) and not is_complex and item.id not in rejected:
                miss = store.miss(identify(COMPLICATIONS, load_prompt(COMPLICATIONS).identity, item.id))
                if miss is None or miss.reason == FAILED:
                    continue  # it may yet be rewritten, in a later run
            text = complex_ones.get(item.id, item.text)
            yield self._made_from(
                record,
                item,
                RESPONSES,
                messages=(Message(role="user", content=text),),
                root=item.id,
                relation=item.relation,
                is_complex=is_complex,
            )

    def _user_turns(self, store: Store, turn: int) -> Iterator[Task]:
        prompt, stage = load_prompt("user_turns"), user_stage(turn)
        for record, item in good_items(store, response_stage(turn - 1)):
            if draw(record.root, stage) < self._structure.turn_share:
                (way,) = _choose(WAYS_TO_GO_ON, item.id, 1)
                own = {"values": {"way": way}, "schema": message_schema(self._structure.domain(record.domain).limits)}
                yield self._made_from(record, item, stage, prompt, **own, **_continued(record, item))

    def _further_responses(self, store: Store, turn: int) -> Iterator[Task]:
        stage = response_stage(turn)
        for record, item in good_items(store, user_stage(turn)):
            yield self._made_from(record, item, stage, id=identify(stage, item.id), **_continued(record, item))

    def _made_from(self, record: Record, item: Item, stage: str, prompt: Prompt | None = None, **own: Any) -> Task:
        """A call about an item of a record; without an id of its own it is the stage's only one about it."""
        lineage = {
            "id": identify(stage, prompt.identity if prompt else "", item.id),
            "meta_topic": record.meta_topic,
            "sub_topic": record.sub_topic,
        }
        domain = self._structure.domain(record.domain)
        return Task(stage=stage, domain=domain, parent=item.id, prompt=prompt, **{**lineage, **own})

    def _is_complicated(self, item: Item) -> bool:
        return draw(item.id, COMPLICATIONS) < self._structure.complex_share


def good_items(store: Store, stage: str) -> Iterator[tuple[Record, Item]]:
    """Items of a stage that are not rejected, with their records."""
    for record in store.records(stage):
        for item in record.items:
            if not item.reject:
                yield record, item


def all_instructions(store: Store) -> Iterator[tuple[Record, Item]]:
    """Good instructions, first those of a topic, then related ones."""
    yield from good_items(store, INSTRUCTIONS)
    yield from good_items(store, RELATED)


def _continued(record: Record, item: Item) -> dict[str, Any]:
    """What a call has of the conversation that an item ends."""
    role = "user" if record.messages[-1].role == "assistant" else "assistant"
    messages = (*record.messages, Message(role=role, content=item.text))
    return {"messages": messages, **{name: getattr(record, name) for name in ("root", "relation", "is_complex")}}


def _choose(options: tuple[str, ...], identity: str, count: int) -> list[str]:
    """So many of the options, or all; which ones depends on the id."""
    return sorted(options, key=lambda option: identify(identity, option))[:count]
