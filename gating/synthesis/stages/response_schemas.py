"""What structured answers look like: the JSON schema that is sent, and how an answer is read, forgivingly.

The schema is strict (exact counts and lengths), for servers that hold to it. Reading is not: a fence or words around
the object, or an entry too many, do no harm; lengths are for the checks. Knows no prompts and no calls.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from ultrafuser.gating.json_text import JsonError, parse_json
from ultrafuser.gating.synthesis.stages.domain import Limits

MISSING = "missing"


class UnusableError(Exception):
    """An answer cannot be read. The text says why, so that the model can be told."""


@dataclass(frozen=True)
class Entry:
    """One thing in an answer."""

    text: str
    note: str = ""
    relation: str = ""
    reject: str = ""


@dataclass(frozen=True)
class ResponseSchema:
    """A kind of structured answer: what a server is told of it, and how it is read."""

    name: str
    """The schema's, for the server."""

    json_schema: Mapping[str, Any]
    """Of the object that is asked for."""

    _read: Callable[[Any], list[Entry]]

    def read(self, text: str, *, may_lack: bool = False) -> list[Entry]:
        """The entries of an answer, as many as were asked for.

        Args:
            text: what the model said.
            may_lack: fill up a list that is too short with entries that are rejected as missing.

        Raises:
            UnusableError: no such object, or too few entries (none, if some may lack).
        """
        start, end = text.find("{"), text.rfind("}")
        if start < 0 or end < start:
            raise UnusableError("it is no JSON object")
        try:
            entries = self._read(parse_json(text[start : end + 1], allows_line_breaks=True))
        except ValidationError as error:
            first = error.errors()[0]
            raise UnusableError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
        except JsonError as error:
            raise UnusableError(f"it is not valid JSON ({error})") from error
        lacking = sum(entry.reject == MISSING for entry in entries)
        if lacking and not (may_lack and lacking < len(entries)):
            raise UnusableError(f"{lacking} of {len(entries)} entries are missing")
        return entries


class _Topics(BaseModel):
    topics: list[str]


class _SubTopic(BaseModel):
    name: str
    note: str = ""


class _SubTopics(BaseModel):
    sub_topics: list[_SubTopic]


class _Instructions(BaseModel):
    instructions: list[str]


class _Instruction(BaseModel):
    instruction: str


class _Message(BaseModel):
    message: str


class _Related(BaseModel):
    strong: list[str] = []
    weak: list[str] = []


def topics_schema(count: int, limits: Limits) -> ResponseSchema:
    """Names of topics, all different."""

    def read(content: Any) -> list[Entry]:
        found = _Topics.model_validate(content).topics
        return _filled([Entry(_one_line(text)) for text in dict.fromkeys(found)], count)

    return ResponseSchema("topics", _object(topics=_list(_string(limits.topic), count)), read)


def sub_topics_schema(count: int, limits: Limits) -> ResponseSchema:
    """Names and notes of topics, all names different."""
    entry = _object(name=_string(limits.topic), note=_string(limits.note))

    def read(content: Any) -> list[Entry]:
        found = {topic.name: topic.note for topic in _SubTopics.model_validate(content).sub_topics}
        return _filled([Entry(_one_line(name), note=_one_line(note)) for name, note in found.items()], count)

    return ResponseSchema("sub_topics", _object(sub_topics=_list(entry, count)), read)


def instructions_schema(count: int, limits: Limits) -> ResponseSchema:
    """Instructions."""

    def read(content: Any) -> list[Entry]:
        return _filled([Entry(text.strip()) for text in _Instructions.model_validate(content).instructions], count)

    return ResponseSchema("instructions", _object(instructions=_list(_instruction(limits), count)), read)


def related_schema(strong: int, weak: int, limits: Limits) -> ResponseSchema:
    """Instructions of both relations, strong ones first."""
    counts = {"strong": strong, "weak": weak}
    lists = {name: _list(_instruction(limits), count) for name, count in counts.items() if count}

    def read(content: Any) -> list[Entry]:
        found = _Related.model_validate(content).model_dump()
        return [
            entry
            for name, count in counts.items()
            for entry in _filled([Entry(text.strip(), relation=name) for text in found[name]], count, name)
        ]

    return ResponseSchema("related", _object(**lists), read)


def instruction_schema(limits: Limits) -> ResponseSchema:
    """One instruction, to be made anew."""
    return _single(_Instruction, _instruction(limits))


def message_schema(limits: Limits) -> ResponseSchema:
    """One message of a user."""
    return _single(_Message, _string(limits.instruction))


def _single(model: type[BaseModel], entry: Mapping[str, Any]) -> ResponseSchema:
    """One text under the name of the model's field, which is the schema's too."""
    (name,) = model.model_fields

    def read(content: Any) -> list[Entry]:
        return [Entry(getattr(model.model_validate(content), name).strip())]

    return ResponseSchema(name, _object(**{name: entry}), read)


def _filled(entries: list[Entry], count: int, relation: str = "") -> list[Entry]:
    entries = [entry for entry in entries if entry.text][:count]
    return entries + [Entry("", relation=relation, reject=MISSING)] * (count - len(entries))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _instruction(limits: Limits) -> dict[str, Any]:
    return _string(limits.instruction, limits.instruction_min)


def _string(longest: int, least: int = 1) -> dict[str, Any]:
    return {"type": "string", "minLength": least, "maxLength": longest}


def _list(entry: Mapping[str, Any], count: int) -> dict[str, Any]:
    return {"type": "array", "items": entry, "minItems": count, "maxItems": count}


def _object(**properties: Any) -> dict[str, Any]:
    closed = {"required": list(properties), "additionalProperties": False}
    return {"type": "object", "properties": properties, **closed}
