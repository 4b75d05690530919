"""A schema's keywords that speak of one type, read into an alternative of that type."""

from collections.abc import Mapping
from typing import Any

from ultrafuser.server.grammar.alternatives import (
    ANY,
    Alternative,
    Array,
    Bound,
    Number,
    Object,
    Places,
    Text,
    Values,
)
from ultrafuser.server.grammar.document import Document, canonical, step
from ultrafuser.server.grammar.errors import ConstraintError, at
from ultrafuser.server.grammar.expression_parser import MAX_REPEAT, parse_search
from ultrafuser.server.grammar.expressions import matches
from ultrafuser.server.grammar.keywords import CONSTRAINING, SPEAKS_OF, TYPES, types_of


class Reader:
    """Reads the subschemas of a document."""

    def __init__(self, document: Document) -> None:
        self._document = document

    def only(self, place: str) -> Places:
        """The place as what must hold; a schema that allows everything is left out."""
        schema = self._document.schema(place)
        is_free = schema is True or (isinstance(schema, dict) and not CONSTRAINING & schema.keys())
        return ANY if is_free else frozenset({place})

    def by_type(self, place: str, schema: Mapping[str, Any]) -> list[Alternative] | None:
        """An alternative for each type that `type` allows; None if nothing is said of types, or of one of them."""
        spoken = [name for name, words in SPEAKS_OF.items() if any(word in schema for word in words)]
        if "type" not in schema and not spoken:
            return None
        named = types_of(schema) if "type" in schema else TYPES
        if "number" in named:
            named = tuple(name for name in named if name != "integer")
        is_open = "type" not in schema
        return [self._one(name, place, schema, is_open and name not in spoken) for name in dict.fromkeys(named)]

    def _one(self, name: str, place: str, schema: Mapping[str, Any], is_implied: bool) -> Alternative:
        match name:
            case "null":
                return Values(values_of([None]), place, is_implied=is_implied)
            case "boolean":
                return Values(values_of([True, False]), place, is_implied=is_implied)
            case "string":
                return self._text(place, schema, is_implied)
            case "array":
                return self._array(place, schema, is_implied)
            case "object":
                return self._object(place, schema, is_implied)
        return _number(place, schema, name == "integer", is_implied)

    def _text(self, place: str, schema: Mapping[str, Any], is_implied: bool) -> Text:
        patterns = frozenset({(schema["pattern"], f"{place}/pattern")} if "pattern" in schema else ())
        for pattern, where in patterns:
            expression(pattern, where)
        if schema.get("minLength", 0) > MAX_REPEAT:
            raise at(f"{place}/minLength", f"can be kept up to {MAX_REPEAT}")
        return Text(
            low=int(schema.get("minLength", 0)),
            high=_count(schema, "maxLength"),
            patterns=patterns,
            format=schema.get("format"),
            is_implied=is_implied,
        )

    def _array(self, place: str, schema: Mapping[str, Any], is_implied: bool) -> Array:
        items, rest_name, prefix_name = schema.get("items", True), "items", "prefixItems"
        if isinstance(items, list):
            if "prefixItems" in schema:
                raise at(f"{place}/items", "must be a schema beside prefixItems")
            rest_name, prefix_name = "additionalItems", "items"
        if "maxContains" in schema and "contains" in schema:
            raise at(f"{place}/maxContains", "cannot be kept; say with prefixItems which elements there are")
        count = int(schema.get("minContains", 1))
        contained = ((self.only(f"{place}/contains"), count, f"{place}/contains"),) if "contains" in schema else ()
        return Array(
            prefix=tuple(
                self.only(f"{place}/{prefix_name}/{number}") for number in range(len(schema.get(prefix_name, ())))
            ),
            rest=self.only(f"{place}/{rest_name}") if rest_name in schema else None,
            low=int(schema.get("minItems", 0)),
            high=_count(schema, "maxItems"),
            contained=contained if count else (),
            unique=f"{place}/uniqueItems" if schema.get("uniqueItems") else None,
            is_implied=is_implied,
        )

    def _object(self, place: str, schema: Mapping[str, Any], is_implied: bool) -> Object:
        patterns = {
            pattern: self.only(f"{place}/patternProperties/{step(pattern)}")
            for pattern in schema.get("patternProperties", {})
        }
        trees = {name: expression(name, f"{place}/patternProperties/{step(name)}") for name in patterns}
        properties = {}
        for name in schema.get("properties", {}):
            hits = [places for pattern, places in patterns.items() if matches(trees[pattern], name)]
            properties[name] = self.only(f"{place}/properties/{step(name)}").union(*hits)
        has_additional = "additionalProperties" in schema
        return Object(
            properties=properties,
            required=tuple(dict.fromkeys(schema.get("required", ()))),
            patterns=patterns,
            additional=self.only(f"{place}/additionalProperties") if has_additional else None,
            is_described="properties" in schema or "required" in schema,
            names=self.only(f"{place}/propertyNames") if "propertyNames" in schema else ANY,
            low=int(schema.get("minProperties", 0)),
            high=_count(schema, "maxProperties"),
            place=place,
            is_implied=is_implied,
        )


def values_of(values: list[Any]) -> dict[str, Any]:
    """Values by what equal ones have in common."""
    return {canonical(value): value for value in values}


def expression(pattern: str, place: str) -> Any:
    """A pattern's expression.

    Raises:
        ConstraintError: at that place.
    """
    try:
        return parse_search(pattern)
    except ConstraintError as error:
        raise at(place, f"{pattern!r}: {error}") from None


def _number(place: str, schema: Mapping[str, Any], is_integer: bool, is_implied: bool) -> Number:
    lows = [(schema[n], n[0] == "e") for n in ("minimum", "exclusiveMinimum") if n in schema]
    highs = [(schema[n], n[0] != "e") for n in ("maximum", "exclusiveMaximum") if n in schema]
    low, high = max(lows, default=None), min(highs, default=None)
    multiples = frozenset({(schema["multipleOf"], f"{place}/multipleOf")} if "multipleOf" in schema else ())
    return Number(
        is_integer=is_integer,
        low=None if low is None else Bound(low[0], low[1]),
        high=None if high is None else Bound(high[0], not high[1]),
        multiples=multiples,
        place=place,
        is_implied=is_implied,
    )


def _count(schema: Mapping[str, Any], name: str) -> int | None:
    return int(schema[name]) if name in schema else None
