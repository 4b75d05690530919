"""Schemas to alternatives: references followed, `allOf`, `anyOf`, `oneOf` and keywords beside them made one choice."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from ultrafuser.server.grammar.alternatives import (
    Alternative,
    Array,
    Number,
    Object,
    Places,
    Text,
    Values,
    together,
    written,
)
from ultrafuser.server.grammar.document import Document, canonical, step
from ultrafuser.server.grammar.errors import at
from ultrafuser.server.grammar.keywords import CONSTRAINING, TYPES, check_form, types_of
from ultrafuser.server.grammar.membership import admits
from ultrafuser.server.grammar.reading import Reader, values_of

MAX_ALTERNATIVES = 500
"""Most alternatives of a schema: keywords that hold together are combined one by one."""

_APART_DEPTH = 4
"""How deep alternatives are searched for what keeps them apart."""


class _Unknown(Exception):
    """A schema's alternatives were asked for while they are being found."""


class NormalForm:
    """The alternatives of every set of places of a document."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self._reader = Reader(document)
        self._found: dict[Places, list[Alternative]] = {}
        self._open: dict[str, int] = {}
        self._frame = 0
        self._num_returns = 0
        self.only: Callable[[str], Places] = self._reader.only

    def of(self, places: Places) -> list[Alternative]:
        """The alternatives of what holds at all these places together; none: nothing does.

        Raises:
            ConstraintError: a keyword there is wrong, or cannot be kept.
        """
        if places not in self._found:
            num_returns = self._num_returns
            own = self._any() if not places else None
            for place in sorted(places):
                found = self._of_one(place)
                own = found if own is None else self._together(place, own, found)
            if self._num_returns > num_returns and self._open:
                return own or []  # only a part: what is being found may add to it
            self._found[places] = own or []
        return self._found[places]

    def fulfils(self, places: Places, value: Any) -> bool:
        """Whether a value is allowed at all these places."""
        return all(any(admits(one, value, self.fulfils) for one in self.of(frozenset({place}))) for place in places)

    def _any(self) -> list[Alternative]:
        return self._reader.by_type("", {"type": list(TYPES)}) or []

    def _of_one(self, place: str) -> list[Alternative]:
        schema = self._document.schema(place)
        if isinstance(schema, bool):
            return self._any() if schema else []
        if place in self._open:
            self._num_returns += 1
            if self._open[place] < self._frame:
                raise _Unknown
            return []  # a schema that is itself adds nothing
        check_form(place, schema)
        self._open[place] = self._frame
        try:
            return self._of_schema(place, schema)
        finally:
            del self._open[place]

    def _of_schema(self, place: str, schema: Mapping[str, Any]) -> list[Alternative]:
        own: list[Alternative] | None = self._reader.by_type(place, schema)
        for part in self._parts(place, schema):
            own = part if own is None else self._together(place, own, part)
        own = self._any() if own is None else own
        own = self._without_unevaluated(place, schema, own)
        return self._without_denied(place, schema, own)

    def _parts(self, place: str, schema: Mapping[str, Any]) -> Iterator[list[Alternative]]:
        """What holds beside the keywords of single types."""
        for name in ("enum", "const"):
            if name in schema:
                values = schema["enum"] if name == "enum" else [schema["const"]]
                yield [Values(values_of(values), f"{place}/{name}")]
        if "$ref" in schema:
            yield self.of(self.only(self._document.target(place, schema["$ref"])))
        for number in range(len(schema.get("allOf", ()))):
            yield self.of(self.only(f"{place}/allOf/{number}"))
        if "anyOf" in schema:
            yield self._either(place, (self.of(self.only(own)) for own in _branches(place, schema, "anyOf")))
        if "oneOf" in schema:
            yield self._one_of(place, schema)
        yield from self._dependent(place, schema)
        if "if" in schema and ("then" in schema or "else" in schema):
            raise at(f"{place}/if", "cannot be kept; write the cases as anyOf")

    def _one_of(self, place: str, schema: Mapping[str, Any]) -> list[Alternative]:
        """As `anyOf`, if the branches exclude each other; a discriminator is taken for required."""
        branches = [self.only(own) for own in _branches(place, schema, "oneOf")]
        discriminator = schema.get("discriminator")
        if isinstance(discriminator, dict) and isinstance(discriminator.get("propertyName"), str):
            required = self._add(place, {"type": "object", "required": [discriminator["propertyName"]]})
            branches = [branch | {required} for branch in branches]
        written_ones = [written(self.of(branch)) for branch in branches]
        for first, own in enumerate(written_ones):
            for second, other in enumerate(branches):
                if first != second and not self._are_apart(place, own, other):
                    low, high = sorted((first, second))
                    raise at(
                        f"{place}/oneOf", f"branches {low} and {high} are not known to exclude each other; write anyOf"
                    )
        return self._either(place, written_ones)

    def _dependent(self, place: str, schema: Mapping[str, Any]) -> Iterator[list[Alternative]]:
        """A property that asks for others, or for a schema: either it is absent, or all holds."""
        for keyword in ("dependentRequired", "dependentSchemas", "dependencies"):
            for name, wanted in schema.get(keyword, {}).items():
                needed = [name, *wanted] if isinstance(wanted, list) else [name]
                absent = self._add(place, {"properties": {name: False}})
                present = frozenset({self._add(place, {"type": "object", "required": needed})})
                if not isinstance(wanted, list):
                    present |= self.only(f"{place}/{keyword}/{step(name)}")
                yield self._either(place, [self.of(frozenset({absent})), self.of(present)])

    def _without_unevaluated(self, place: str, schema: Mapping[str, Any], own: list[Alternative]) -> list[Alternative]:
        """Elements and properties of which no other keyword speaks follow `unevaluated...`."""
        for name, kind in (("unevaluatedProperties", dict), ("unevaluatedItems", list)):
            if name not in schema:
                continue
            rest, where = self.only(f"{place}/{name}"), f"{place}/{name}"
            values = [value for one in own if isinstance(one, Values) for value in one.values.values()]
            if any(isinstance(value, kind) and value for value in values):
                raise at(where, "cannot be kept beside values that are written down")
            if kind is list and any(isinstance(one, Array) and one.contained for one in own):
                raise at(where, "cannot be kept beside contains")
            own = [_with_rest(one, kind, rest) for one in own]
        return own

    def _without_denied(self, place: str, schema: Mapping[str, Any], own: list[Alternative]) -> list[Alternative]:
        """What `not` leaves: values are asked one by one, of types all or none has to be left."""
        if "not" not in schema:
            return own
        denied = frozenset({f"{place}/not"})
        inner = self._document.schema(f"{place}/not")
        is_of_types = isinstance(inner, dict) and CONSTRAINING & inner.keys() == {"type"}
        denied_types = types_of(inner) if isinstance(inner, dict) and is_of_types else ()
        left: list[Alternative] = []
        for one in own:
            if isinstance(one, Values):
                kept = self._filtered(one, lambda value: not self.fulfils(denied, value))
                left += [replace(one, values=kept)] if kept else []
            elif _type_name(one) in denied_types:
                continue
            elif self._are_apart(place, [one], denied):
                left.append(one)
            elif not one.is_implied:
                raise at(f"{place}/not", "cannot be kept; say what is allowed instead")
        return left

    def _together(self, place: str, left: list[Alternative], right: list[Alternative]) -> list[Alternative]:
        found: list[Alternative] = []
        for one in left:
            for other in right:
                both = self._pair(one, other)
                found += [both] if both is not None else []
                _refuse_many(place, found)
        return found

    def _pair(self, one: Alternative, other: Alternative) -> Alternative | None:
        if not isinstance(one, Values) and not isinstance(other, Values):
            return together(one, other)
        if not isinstance(one, Values):
            one, other = other, one
        assert isinstance(one, Values)
        kept = self._filtered(one, lambda value: admits(other, value, self.fulfils))
        return replace(one, values=kept, is_implied=one.is_implied and other.is_implied) if kept else None

    def _filtered(self, own: Values, is_kept: Callable[[Any], bool]) -> dict[str, Any]:
        with self._inner():
            try:
                return {key: value for key, value in own.values.items() if is_kept(value)}
            except _Unknown:
                raise at(own.place, "stands beside a reference to itself, which cannot be kept") from None

    def _either(self, place: str, branches: Iterable[list[Alternative]]) -> list[Alternative]:
        own = [one for branch in branches for one in branch]
        _refuse_many(place, own)
        return own

    def _are_apart(self, place: str, own: list[Alternative], other: Places) -> bool:
        """Whether it is certain that nothing is allowed by both."""
        with self._inner():
            try:
                return all(self._is_nothing(one, _APART_DEPTH) for one in self._together(place, own, self.of(other)))
            except _Unknown:
                return False

    def _is_nothing(self, one: Alternative, depth: int) -> bool:
        match one:
            case Number():
                return one.low is not None and one.high is not None and _is_empty(one)
            case Text() | Array():
                return one.high is not None and one.low > one.high
            case Object() if depth:
                children = [one.child(name) for name in one.required]
                return any(self._has_nothing(child, depth - 1) for child in children)
        return False

    def _has_nothing(self, child: Places, depth: int) -> bool:
        """A child that is being found may turn out to be something; its siblings can still be nothing."""
        try:
            return all(self._is_nothing(one, depth) for one in self.of(child))
        except _Unknown:
            return False

    @contextmanager
    def _inner(self) -> Iterator[None]:
        self._frame += 1
        try:
            yield
        finally:
            self._frame -= 1

    def _add(self, place: str, schema: dict[str, Any]) -> str:
        """A schema of our own, which no pointer leads to."""
        own = self._document.add(f"{place}#{canonical(schema)}", schema)
        for name, child in schema.get("properties", {}).items():
            self._document.add(f"{own}/properties/{step(name)}", child)
        return own


def _with_rest(one: Alternative, kind: type, rest: Places) -> Alternative:
    if kind is dict and isinstance(one, Object) and one.additional is None:
        return replace(one, additional=rest)
    if kind is list and isinstance(one, Array) and one.rest is None:
        return replace(one, rest=rest)
    return one


def _branches(place: str, schema: Mapping[str, Any], keyword: str) -> list[str]:
    return [f"{place}/{keyword}/{number}" for number in range(len(schema[keyword]))]


def _type_name(one: Alternative) -> str:
    if isinstance(one, Number):
        return "integer" if one.is_integer else "number"
    return {Text: "string", Array: "array", Object: "object"}.get(type(one), "")


def _is_empty(number: Number) -> bool:
    assert number.low is not None
    assert number.high is not None
    low, high = number.low, number.high
    return low.value > high.value or (low.value == high.value and (low.is_excluded or high.is_excluded))


def _refuse_many(place: str, found: list[Alternative]) -> None:
    if len(found) > MAX_ALTERNATIVES:
        raise at(place, f"its keywords combine into more than {MAX_ALTERNATIVES} alternatives; simplify it")
