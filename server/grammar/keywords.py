"""The keywords of JSON Schema: of which type they speak, and what their values must look like.

What is in no table here says nothing of an answer (titles, defaults, words of other tools) and has no effect. `format`
says something where it stands alone: `emission.py` names the values that are kept.
"""

from collections.abc import Callable, Mapping
from typing import Any

from ultrafuser.server.grammar.document import step
from ultrafuser.server.grammar.errors import at

TYPES = ("object", "array", "string", "number", "boolean", "null")

SPEAKS_OF = {
    "number": ("multipleOf", "maximum", "exclusiveMaximum", "minimum", "exclusiveMinimum"),
    "string": ("maxLength", "minLength", "pattern"),
    "array": (
        *("maxItems", "minItems", "uniqueItems", "contains", "minContains", "maxContains"),
        *("items", "prefixItems", "additionalItems", "unevaluatedItems"),
    ),
    "object": (
        *("maxProperties", "minProperties", "required", "properties", "patternProperties", "additionalProperties"),
        *("propertyNames", "unevaluatedProperties", "dependentRequired", "dependentSchemas", "dependencies"),
    ),
}
"""Keywords that hold for values of one type, and let pass what is of another."""

OF_ANY_TYPE = ("type", "enum", "const", "allOf", "anyOf", "oneOf", "not", "if", "$ref")
"""Keywords that hold for every value. `then` and `else` say nothing without `if`."""

REFUSED = {
    "$dynamicRef": "cannot be kept; write $ref",
    "$recursiveRef": "cannot be kept; write $ref",
}

CONSTRAINING = frozenset(OF_ANY_TYPE) | {name for names in SPEAKS_OF.values() for name in names} | set(REFUSED)


def check_form(place: str, schema: dict[str, Any]) -> None:
    """Refuse keywords that cannot be kept, or whose values are not of the form that they must have.

    Raises:
        ConstraintError: naming the keyword by its place.
    """
    for name, reason in REFUSED.items():
        if name in schema:
            raise at(f"{place}/{name}", reason)
    for names, is_right, form in _FORMS:
        for name in names:
            if name in schema and not is_right(schema[name]):
                raise at(f"{place}/{step(name)}", f"must be {form}")


def types_of(schema: Mapping[str, Any]) -> tuple[str, ...]:
    """The types that a schema's `type` names; `integer` may be among them."""
    own = schema["type"]
    return (own,) if isinstance(own, str) else tuple(own)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return _is_number(value) and value >= 0 and value == int(value)


def _is_list_of(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(is_right(own) for own in value)


def _is_map_of(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(is_right(own) for own in value.values())


def _is_string(value: Any) -> bool:
    return isinstance(value, str)


def _is_schema(value: Any) -> bool:
    return isinstance(value, dict | bool)


def _is_type(value: Any) -> bool:
    return isinstance(value, str) and value in (*TYPES, "integer")


_are_names = _is_list_of(_is_string)
_are_schemas = _is_list_of(_is_schema)

_FORMS: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (
        ("type",),
        lambda value: _is_type(value) or (bool(value) and _is_list_of(_is_type)(value)),
        f"one of {', '.join(TYPES)} and integer, or a list of them",
    ),
    (("enum",), lambda value: isinstance(value, list) and bool(value), "a list with at least one value"),
    (("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), _is_number, "a number"),
    (("multipleOf",), lambda value: _is_number(value) and value > 0, "a number above 0"),
    (
        (
            *("minLength", "maxLength", "minItems", "maxItems", "minContains", "maxContains"),
            *("minProperties", "maxProperties"),
        ),
        _is_count,
        "a whole number, at least 0",
    ),
    (("pattern", "format"), _is_string, "a string"),
    (("uniqueItems",), lambda value: isinstance(value, bool), "true or false"),
    (("required",), _are_names, "a list of strings"),
    (("dependentRequired",), _is_map_of(_are_names), "an object of lists of strings"),
    (
        ("dependencies",),
        _is_map_of(lambda value: _is_schema(value) or _are_names(value)),
        "an object of schemas and lists of strings",
    ),
    (("properties", "patternProperties", "dependentSchemas"), _is_map_of(_is_schema), "an object of schemas"),
    (
        ("allOf", "anyOf", "oneOf", "prefixItems"),
        lambda value: bool(value) and _are_schemas(value),
        "a list of at least one schema",
    ),
    (("items",), lambda value: _is_schema(value) or _are_schemas(value), "a schema"),
    (
        (
            *("additionalProperties", "unevaluatedProperties", "propertyNames", "contains", "not", "if", "then"),
            *("else", "additionalItems", "unevaluatedItems"),
        ),
        _is_schema,
        "a schema",
    ),
)
