"""Alternatives as a schema that the grammar library keeps: one type or a list of values, or a choice of these."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from ultrafuser.server.grammar.alternatives import (
    ANY,
    Alternative,
    Array,
    Number,
    Object,
    Places,
    Text,
    Values,
    written,
)
from ultrafuser.server.grammar.document import MAX_NESTING
from ultrafuser.server.grammar.errors import at
from ultrafuser.server.grammar.expressions import library_text
from ultrafuser.server.grammar.fulfilment import Fulfilment
from ultrafuser.server.grammar.normal_form import NormalForm
from ultrafuser.server.grammar.numbers import number_schema
from ultrafuser.server.grammar.objects import ObjectWriter
from ultrafuser.server.grammar.texts import text_expression

FORMATS = frozenset(
    {"email", "date", "time", "date-time", "duration", "ipv4", "ipv6", "hostname", "uuid", "uri", "uri-reference"}
)
"""Formats that are kept where nothing else is said of a string; others are annotations."""

MAX_ARRANGED = 5
"""Most values of which all arrangements without repetition are written down."""

_MAX_INLINED = MAX_NESTING // 2
"""How deep a place may be at which a definition is written out."""

_REFERENCE = "#/$defs/"


class Writer:
    """Writes what is to hold at places as a schema; each set of places that has children once."""

    def __init__(self, normal_form: NormalForm, name: str) -> None:
        """`name` begins the names of definitions."""
        self._normal_form, self._name = normal_form, name
        self._fulfilment = Fulfilment(normal_form)
        self._objects = ObjectWriter(normal_form, self._fulfilment.is_possible, self.child)
        self._names: dict[Places, str] = {}
        self._definitions: dict[str, Any] = {}
        self._expressions: dict[str, str] = {}

    def root(self, place: str) -> dict[str, Any]:
        """The whole schema.

        Raises:
            ConstraintError: nothing fulfils it, or a keyword cannot be kept.
        """
        places = self._normal_form.only(place)
        if not self._fulfilment.is_possible(places):
            raise at("", "nothing fulfils it: no text that comes to an end is allowed by all its keywords")
        schema = self.child(places)
        while schema.keys() == {"$ref"}:
            schema = self._definitions[schema["$ref"].removeprefix(_REFERENCE)]
        return _inlined(schema, self._definitions)

    def child(self, places: Places) -> Any:
        """A schema, or a reference to it, of what can be fulfilled."""
        if places == ANY:
            return {}  # the library takes no `true` among prefixItems
        alternatives = [one for one in self._normal_form.of(places) if self._fulfilment.has(one)]
        own = written(alternatives)
        if not any(isinstance(one, Array | Object) for one in own):
            return self._either(own)
        if places not in self._names:
            name = self._names[places] = f"{self._name}{len(self._names)}"
            self._definitions[name] = self._either(own)
        return {"$ref": _REFERENCE + self._names[places]}

    def _either(self, alternatives: Sequence[Alternative]) -> dict[str, Any]:
        values = {
            key: (value, one.place)
            for one in alternatives
            if isinstance(one, Values)
            for key, value in one.values.items()
        }
        options = [{"enum": [_checked(place, value) for value, place in values.values()]}] if values else []
        for one in alternatives:
            if not isinstance(one, Values):
                options += [own for own in self._one(one) if own not in options]
        return options[0] if len(options) == 1 else {"anyOf": options}

    def _one(self, one: Alternative) -> list[dict[str, Any]]:
        match one:
            case Number():
                return [number_schema(one)]
            case Text():
                return [self._text(one)]
            case Array():
                return self._array(one)
            case Object():
                return [self._objects.schema(one)]
        raise AssertionError(f"no {type(one).__name__}")

    def _text(self, own: Text) -> dict[str, Any]:
        """Equal expressions are written once: the library takes a tenth of a second for each."""
        tree = text_expression(own)
        if tree is None:
            return {"type": "string"} | ({"format": own.format} if own.format in FORMATS else {})
        text = f"^{library_text(tree)}$"
        name = self._expressions.setdefault(text, f"{self._name}x{len(self._expressions)}")
        self._definitions[name] = {"type": "string", "pattern": text}
        return {"$ref": _REFERENCE + name}

    def _array(self, own: Array) -> list[dict[str, Any]]:
        if own.unique and (own.high is None or own.high > 1):
            return [{"enum": self._arranged(own, own.unique)}]
        prefix = list(own.prefix)
        for places, count, where in own.contained:
            prefix = self._containing(own, prefix, places, count, where)
        rest = own.rest
        if rest is None and own.prefix and own.low <= len(prefix):
            rest_schema: Any = False  # as pydantic's tuples mean it: no more than is described
        else:
            rest_schema = self.child(rest or ANY) if self._fulfilment.is_possible(rest or ANY) else False
        possible = next((n for n, places in enumerate(prefix) if not self._fulfilment.is_possible(places)), None)
        schema: dict[str, Any] = {"type": "array"}
        if prefix and possible != 0:
            schema["prefixItems"] = [self.child(places) for places in prefix[:possible]]
        schema["items"] = False if possible is not None else rest_schema
        low = max(own.low, len(prefix) if own.contained else 0)
        return [schema | ({"minItems": low} if low else {}) | ({} if own.high is None else {"maxItems": own.high})]

    def _containing(self, own: Array, prefix: list[Places], places: Places, count: int, where: str) -> list[Places]:
        """The first elements that can be are those which have to be contained."""
        number = 0
        while count:
            if own.high is not None and number >= own.high:
                raise at(where, "cannot be kept beside the other keywords of this array")
            if number == len(prefix):
                prefix.append(own.rest or ANY)
            both = prefix[number] | places
            if self._fulfilment.is_possible(both):
                prefix[number], count = both, count - 1
            elif number >= len(own.prefix):
                raise at(where, "cannot be kept beside the other keywords of this array")
            number += 1
        return prefix

    def _arranged(self, own: Array, where: str) -> list[list[Any]]:
        """All arrays of few values without repetition."""
        alternatives = self._normal_form.of(own.rest or ANY)
        values = [value for one in alternatives if isinstance(one, Values) for value in one.values.values()]
        is_of_values = all(isinstance(one, Values) for one in alternatives)
        if not is_of_values or own.prefix or own.contained or len(values) > MAX_ARRANGED:
            raise at(where, f"cannot be kept but for items of at most {MAX_ARRANGED} values")
        high = len(values) if own.high is None else min(own.high, len(values))
        found: list[list[Any]] = []
        level: list[list[Any]] = [[]]
        for length in range(high + 1):
            found += level if length >= own.low else []
            level = [[*array, value] for array in level for value in values if value not in array]
        if not found:
            raise at(where, "nothing fulfils it")
        return found


def _checked(place: str, value: Any) -> Any:
    """A value that the library writes as it is."""
    if isinstance(value, dict | list):
        for own in value.values() if isinstance(value, dict) else value:
            _checked(place, own)
    if isinstance(value, int) and abs(value) >= 2**63:
        raise at(place, "a whole number needs more than 64 bits")
    if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
        raise at(place, "half of a surrogate pair is no character")
    return value


def _inlined(schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """References that occur once replaced by what they lead to, where that nests no deeper than schemas may.

    A tool's schema is read a second time, within others.
    """
    counts: Counter[str] = Counter()
    _count(schema, counts)
    for own in definitions.values():
        _count(own, counts)
    kept: dict[str, Any] = {}

    def inline(value: Any, depth: int) -> Any:
        if isinstance(value, list):
            return [inline(own, depth + 1) for own in value]
        if not isinstance(value, dict):
            return value
        name = str(value.get("$ref", "")).removeprefix(_REFERENCE)
        if value.keys() == {"$ref"} and name in definitions:
            if counts[name] == 1 and depth < _MAX_INLINED:
                return inline(definitions[name], depth)
            if name not in kept:
                kept[name] = None
                kept[name] = inline(definitions[name], 0)
            return value
        return {key: own if _are_values(key, own) else inline(own, depth + 1) for key, own in value.items()}

    root = inline(schema, 0)
    return root | ({"$defs": kept} if kept else {})


def _are_values(key: str, own: Any) -> bool:
    """Whether this is the keyword `enum`, and no property of that name."""
    return key == "enum" and isinstance(own, list)


def _count(value: Any, counts: "Counter[str]") -> None:
    if isinstance(value, dict):
        if value.keys() == {"$ref"} and isinstance(value["$ref"], str):
            counts[value["$ref"].removeprefix(_REFERENCE)] += 1
        for key, own in value.items():
            if not _are_values(key, own):
                _count(own, counts)
    elif isinstance(value, list):
        for own in value:
            _count(own, counts)
