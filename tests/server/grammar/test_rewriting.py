"""docs/api.md says of every keyword of JSON Schema what becomes of it, and it does: the real library is asked."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
from jsonschema_specifications import REGISTRY  # type: ignore[import-untyped]

from tests.server.grammar.walks import COMPILER, compiled_schema, lets_through
from ultrafuser.server.grammar.compiling import compiled
from ultrafuser.server.grammar.errors import ConstraintError
from ultrafuser.server.grammar.rewriting import kept_schema

PAGE = (Path(__file__).parents[3] / "docs" / "api.md").read_text()
(_SECTION,) = re.findall(r"^## Structured outputs\n(.*?)(?=^## )", PAGE, re.MULTILINE | re.DOTALL)
TABLE = {
    keyword: fate
    for names, fate in re.findall(r"^\| (`.+?`) \| (.*?) \|", _SECTION, re.MULTILINE)
    for keyword in re.findall(r"`(.+?)`", names)
}
OLDER = {"definitions", "dependencies", "additionalItems", "$recursiveRef", "$recursiveAnchor"}
"""Keywords of older drafts, which people still write."""

AB = {"a": {"type": "integer"}, "b": {"type": "string"}}
OBJECT = {"type": "object"}
PAIR = [{"type": "integer"}, {"type": "string"}]
LEFT_FIRST = {"required": ["left", "kind"]}
TEXTS = {"type": "array", "items": {"type": "string"}}

EXPRESSION = {
    "$ref": "#/$defs/E",
    "$defs": {
        "E": {
            "oneOf": [
                *(
                    {**OBJECT, "properties": {"left": {"$ref": "#/$defs/E"}, "kind": {"const": kind}}} | LEFT_FIRST
                    for kind in ("add", "neg")
                ),
                {"type": "null"},
            ]
        }
    },
}
"""A recursive union; what tells its branches apart comes after what is recursive."""

KEPT: list[tuple[str, Any, list[str], list[str]]] = [
    ("type", {"type": "integer"}, ["1", "-7"], ['"1"', "1.5", "null"]),
    ("type", {"type": ["string", "null"]}, ['"a"', "null"], ["1", "{}"]),
    ("enum", {"enum": [1, "a", None, {"x": [1]}]}, ["1", '"a"', "null", '{"x":[1]}'], ["2", '"b"']),
    ("enum", {"type": "string", "enum": [1, "a"]}, ['"a"'], ["1"]),
    ("enum", {"enum": ["ab", "abc", 3], "maxLength": 2}, ['"ab"', "3"], ['"abc"']),
    ("const", {"const": 5}, ["5"], ["6"]),
    ("const", {"const": "a", "enum": ["a", "b"]}, ['"a"'], ['"b"']),
    ("multipleOf", {"type": "integer", "multipleOf": 3}, ["3", "-6", "0"], ["4"]),
    ("multipleOf", {"type": "integer", "multipleOf": 5, "minimum": 1}, ["5", "20"], ["0", "7", "-5"]),
    ("multipleOf", {"type": "number", "multipleOf": 0.25, "minimum": 0, "maximum": 1}, ["0.25", "1"], ["0.3", "2"]),
    ("maximum", {"type": "number", "maximum": 1.5}, ["1.5", "-3"], ["1.51", "2"]),
    ("exclusiveMaximum", {"type": "integer", "exclusiveMaximum": 10}, ["9"], ["10"]),
    ("minimum", {"type": "integer", "minimum": 2.5}, ["3"], ["2", "-3"]),
    ("exclusiveMinimum", {"type": "number", "exclusiveMinimum": 0}, ["0.1", "3"], ["0", "0.0", "-1"]),
    ("minimum", {"anyOf": [{"type": "integer"}, {"type": "null"}], "minimum": 5}, ["5", "null"], ["4"]),
    ("maxLength", {"type": "string", "maxLength": 2}, ['""', '"ab"', '"😀é"'], ['"abc"']),
    ("maxLength", {"type": "string", "maxLength": 200_000}, ['"ab"'], ["1"]),
    ("minLength", {"type": "string", "minLength": 2}, ['"ab"'], ['"a"', '"\\ud83d\\ude00"']),
    ("pattern", {"type": "string", "pattern": "b+"}, ['"abc"', '"b"'], ['"ac"', '""']),
    ("pattern", {"type": "string", "pattern": "^a|b$"}, ['"ax"', '"xb"'], ['"xa"']),
    ("pattern", {"type": "string", "pattern": "^[^a]$"}, ['"b"', '"é"'], ['"a"', '"""', '"\\"']),
    ("pattern", {"type": "string", "pattern": "^[a-z]+$", "maxLength": 3}, ['"abc"'], ['"abcd"', '""']),
    ("maxItems", {"type": "array", "maxItems": 1}, ["[]", "[1]"], ["[1,2]"]),
    ("minItems", {"type": "array", "minItems": 2}, ["[1,2]"], ["[1]"]),
    (
        "uniqueItems",
        {"type": "array", "uniqueItems": True, "items": {"enum": ["a", "b"]}},
        ['["b","a"]'],
        ['["a","a"]'],
    ),
    ("uniqueItems", {"type": "array", "uniqueItems": True, "maxItems": 1}, ["[1]"], ["[1,1]"]),
    ("contains", {**TEXTS, "contains": {"const": "x"}}, ['["x"]', '["x","y"]'], ["[]", '["y"]']),
    ("minContains", {**TEXTS, "contains": {"const": "x"}, "minContains": 2}, ['["x","x"]'], ['["x"]']),
    ("minContains", {**TEXTS, "contains": {"const": "x"}, "minContains": 0}, ["[]", '["y"]'], ["[1]"]),
    ("maxProperties", {**OBJECT, "maxProperties": 1}, ["{}", '{"a":1}'], ['{"a":1,"b":2}']),
    ("minProperties", {**OBJECT, "minProperties": 1}, ['{"a":1}'], ["{}"]),
    ("minProperties", {**OBJECT, "properties": AB, "minProperties": 2}, ['{"a":1,"b":""}'], ['{"a":1}']),
    ("required", {**OBJECT, "properties": AB, "required": ["b"]}, ['{"b":""}', '{"a":1,"b":""}'], ['{"a":1}']),
    ("required", {**OBJECT, "required": ["x"]}, ['{"x":[]}'], ["{}"]),
    (
        "dependentRequired",
        {**OBJECT, "properties": AB, "dependentRequired": {"a": ["b"]}},
        ["{}", '{"b":""}'],
        ['{"a":1}'],
    ),
    (
        "dependentSchemas",
        {**OBJECT, "properties": AB, "dependentSchemas": {"a": {"required": ["b"]}}},
        ["{}"],
        ['{"a":1}'],
    ),
    ("dependencies", {**OBJECT, "properties": AB, "dependencies": {"a": ["b"]}}, ['{"a":1,"b":""}'], ['{"a":1}']),
    ("properties", {**OBJECT, "properties": AB}, ["{}", '{"a":1}'], ['{"a":""}', '{"c":1}']),
    (
        "properties",
        {**OBJECT, "properties": {"enum": TEXTS, "const": OBJECT}},
        ['{"enum":["a"],"const":{}}'],
        ['{"enum":[1]}'],
    ),
    ("properties", {**OBJECT, "properties": {}}, ["{}"], ['{"a":1}']),
    ("properties", {**OBJECT, "properties": {"a": {}, "b": False}}, ['{"a":1}'], ['{"b":1}']),
    (
        "patternProperties",
        {**OBJECT, "patternProperties": {"^x": {"type": "null"}}},
        ['{"xy":null}'],
        ['{"x":1}', '{"y":1}'],
    ),
    ("additionalProperties", {**OBJECT, "additionalProperties": {"type": "integer"}}, ['{"q":1}'], ['{"q":""}']),
    (
        "additionalProperties",
        {**OBJECT, "properties": AB, "additionalProperties": {"type": "null"}},
        ['{"a":1,"q":null}', '{"ab":null}'],
        ['{"a":1,"a":null}', '{"\\u0061":null}', '{"q":1}'],
    ),
    ("additionalProperties", {**OBJECT, "properties": AB, "additionalProperties": False}, ['{"a":1}'], ['{"q":1}']),
    ("propertyNames", {**OBJECT, "propertyNames": {"pattern": "^a+$"}}, ['{"aa":1}'], ['{"b":1}', '{"\\u0062":1}']),
    (
        "propertyNames",
        {**OBJECT, "propertyNames": {"enum": ["x", "y"]}, "required": ["x"]},
        ['{"x":1}'],
        ['{"z":1}', "{}"],
    ),
    ("items", {"type": "array", "items": {"type": "integer"}}, ["[1]"], ['["a"]']),
    ("items", {"type": "array", "items": PAIR, "additionalItems": False}, ['[1,"a"]'], ['["a"]', '[1,"a",1]']),
    (
        "additionalItems",
        {"type": "array", "items": PAIR, "additionalItems": {"type": "null"}},
        ['[1,"a",null]'],
        ['[1,"a",1]'],
    ),
    ("prefixItems", {"type": "array", "prefixItems": PAIR, "minItems": 2}, ['[1,"a"]'], ["[1]", '["a","a"]']),
    ("prefixItems", {"type": "array", "prefixItems": PAIR, "items": {"type": "null"}}, ['[1,"a",null]'], ['[1,"a",1]']),
    ("unevaluatedItems", {"type": "array", "prefixItems": PAIR, "unevaluatedItems": False}, ['[1,"a"]'], ['[1,"a",1]']),
    (
        "unevaluatedProperties",
        {"allOf": [{"properties": AB}], "unevaluatedProperties": False},
        ['{"a":1}'],
        ['{"q":1}'],
    ),
    ("allOf", {"allOf": [{"type": "integer"}, {"minimum": 5}]}, ["5"], ["4", '"a"']),
    (
        "allOf",
        {"allOf": [{"properties": {"a": {"type": "integer"}}, "required": ["a"]}, {"properties": {"b": {}}}]},
        ['{"a":1,"b":null}'],
        ['{"b":null}', '{"a":"x"}'],
    ),
    ("anyOf", {"anyOf": [{"type": "integer"}, {"type": "null"}]}, ["1", "null"], ['"a"']),
    (
        "anyOf",
        {"properties": AB, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
        ['{"a":1}', '{"b":""}', '{"a":1,"b":""}'],
        ["{}"],
    ),
    ("oneOf", {"oneOf": [{"type": "integer"}, {"type": "string"}]}, ["1", '"a"'], ["null"]),
    (
        "oneOf",
        {
            "oneOf": [
                {"properties": {"kind": {"const": "a"}, "x": {"type": "integer"}}, "required": ["kind", "x"]},
                {"properties": {"kind": {"const": "b"}}, "required": ["kind"]},
            ]
        },
        ['{"kind":"a","x":1}', '{"kind":"b"}'],
        ['{"kind":"a"}', '{"kind":"c"}'],
    ),
    (
        "oneOf",
        EXPRESSION,
        ['{"left":{"left":null,"kind":"neg"},"kind":"add"}'],
        ['{"left":1,"kind":"add"}', '{"kind":"add"}'],
    ),
    ("not", {"type": "string", "not": {"type": "integer"}}, ['"a"'], ["1"]),
    ("not", {"enum": ["a", "b"], "not": {"const": "b"}}, ['"a"'], ['"b"']),
    ("not", {"type": ["string", "null"], "not": {"type": "null"}}, ['"a"'], ["null"]),
    ("$ref", {"$ref": "#/$defs/a", "minimum": 3, "$defs": {"a": {"type": "integer"}}}, ["3"], ["2", '"a"']),
    ("$ref", {"$ref": "#/$defs/a~1b%20c", "$defs": {"a/b c": {"type": "integer"}}}, ["3"], ['"a"']),
    ("$ref", {**OBJECT, "properties": {"a": {"$ref": "#"}}}, ['{"a":{"a":{}}}'], ['{"a":1}']),
    (
        "$ref",
        {
            "$ref": "#/components/schemas/P",
            "components": {
                "schemas": {"P": {**OBJECT, "properties": {"a": {"$ref": "#/components/schemas/Q"}}}, "Q": PAIR[1]}
            },
        },
        ['{"a":"x"}'],
        ['{"a":1}'],
    ),
    ("$defs", {"$defs": {"a": {"type": "null"}}, "$ref": "#/$defs/a"}, ["null"], ["1"]),
    ("definitions", {"definitions": {"a": {"type": "null"}}, "$ref": "#/definitions/a"}, ["null"], ["1"]),
    ("$anchor", {"$defs": {"a": {"$anchor": "here", "type": "null"}}, "$ref": "#here"}, ["null"], ["1"]),
    ("$id", {"$id": "http://x/y", "$defs": {"a": {"$id": "z", "type": "null"}}, "$ref": "http://x/z"}, ["null"], ["1"]),
    ("$id", {"$id": "http://x/y", "$defs": {"a": {"$id": "z", "type": "null"}}, "$ref": "z"}, ["null"], ["1"]),
    (
        "$id",
        {
            "$defs": {
                "a": {"$id": "http://x/a", "$ref": "b"},
                "again": {"$id": "http://x/a", "$ref": "b"},
                "b": {"$id": "http://x/b", "type": "null"},
            },
            "anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/again"}],
        },
        ["null"],
        ["1"],
    ),
    ("format", {"type": "string", "format": "date"}, ['"2024-02-29"'], ['"tomorrow"']),
]
"""A keyword, a schema, texts that follow it and texts that do not."""

REFUSED: list[tuple[str, Any, str]] = [
    ("if", {"if": {"type": "integer"}, "then": {"minimum": 3}}, "/if"),
    ("then", {"if": {"type": "integer"}, "then": {"minimum": 3}}, "/if"),
    ("else", {"if": {"type": "integer"}, "else": {"minLength": 3}}, "/if"),
    ("maxContains", {"type": "array", "contains": {"type": "null"}, "maxContains": 1}, "/maxContains"),
    ("$dynamicRef", {"$dynamicRef": "#x"}, "/$dynamicRef"),
    ("$recursiveRef", {"$recursiveRef": "#"}, "/$recursiveRef"),
    # Kept in other places, not in these.
    ("minLength", {"type": "string", "minLength": 200_000}, "/minLength"),
    ("not", {"properties": {"a": {"type": "string", "not": {"const": "x"}}}}, "/properties/a/not"),
    ("oneOf", {"oneOf": [{"type": "integer"}, {"type": "number"}]}, "/oneOf"),
    ("uniqueItems", {"type": "array", "uniqueItems": True}, "/uniqueItems"),
    ("multipleOf", {"type": "number", "multipleOf": 0.01}, "/multipleOf"),
    ("pattern", {"items": {"pattern": "^(?!a)b"}}, "/items/pattern"),
    ("pattern", {"patternProperties": {"(?=a)": {}}}, "/patternProperties/(?=a)"),
    ("pattern", {"type": "string", "pattern": "\\p{L}"}, "/pattern"),
    ("patternProperties", {"patternProperties": {"a": {"type": "null"}, "b": {}}}, "/patternProperties"),
    ("propertyNames", {"patternProperties": {"a": {}}, "propertyNames": {"maxLength": 3}}, "/patternProperties"),
    ("minProperties", {"type": "object", "minProperties": 2}, "/minProperties"),
    ("unevaluatedItems", {"contains": {"type": "null"}, "unevaluatedItems": False}, "/unevaluatedItems"),
    ("unevaluatedProperties", {"const": {"a": 1}, "unevaluatedProperties": False}, "/unevaluatedProperties"),
]
"""A keyword, a schema with it that cannot be kept, and the place that is named."""


def test_the_table_has_every_keyword_of_the_standard_and_those_of_older_drafts() -> None:
    standard = {
        keyword
        for uri in REGISTRY
        if "draft/2020-12/meta/" in uri
        for keyword in REGISTRY.contents(uri).get("properties", {})
    }
    assert len(standard) > 50
    assert set(TABLE) == standard | OLDER
    assert set(TABLE.values()) == {"kept", "partly kept", "refused", "annotation"}


def test_every_keyword_of_the_table_has_its_cases_here() -> None:
    kept, refused = {name for name, *_ in KEPT}, {name for name, *_ in REFUSED}
    for keyword, fate in TABLE.items():
        expected = {"kept": (True, False), "partly kept": (True, True), "refused": (False, True)}
        assert (keyword in kept, keyword in refused) == expected.get(fate, (False, False)), keyword


@pytest.mark.parametrize(
    ("keyword", "schema", "right", "wrong"), KEPT, ids=[f"{k}-{n}" for n, (k, *_) in enumerate(KEPT)]
)
def test_what_is_kept_lets_through_what_it_allows_only(
    keyword: str, schema: Any, right: list[str], wrong: list[str]
) -> None:
    grammar = compiled_schema(schema)
    for text in right:
        assert lets_through(grammar, text), text
    for text in wrong:
        assert not lets_through(grammar, text), text


@pytest.mark.parametrize(("keyword", "schema", "place"), REFUSED, ids=[f"{k}-{n}" for n, (k, *_) in enumerate(REFUSED)])
def test_what_is_not_kept_is_refused_by_its_place(keyword: str, schema: Any, place: str) -> None:
    with pytest.raises(ConstraintError) as refused:
        compiled_schema(schema)
    assert str(refused.value).startswith(f"{place}: ")


@pytest.mark.parametrize("keyword", [name for name, fate in TABLE.items() if fate == "annotation"])
def test_an_annotation_changes_nothing(keyword: str) -> None:
    value: Any = {"contentSchema": {"type": "string"}, "$vocabulary": {}, "examples": [1]}.get(keyword, "word")
    grammar = compiled_schema({"type": "integer", keyword: value})
    assert lets_through(grammar, "1")
    assert not lets_through(grammar, '"word"')


MALFORMED: list[tuple[Any, str]] = [
    ({"type": "string", "minLength": -1}, "/minLength"),
    ({"type": "string", "minLength": "3"}, "/minLength"),
    ({"type": "text"}, "/type"),
    ({"type": []}, "/type"),
    ({"enum": []}, "/enum"),
    ({"anyOf": []}, "/anyOf"),
    ({"properties": {"a": {"properties": []}}}, "/properties/a/properties"),
    ({"properties": {"a": 1}}, "/properties"),
    ({"required": "a"}, "/required"),
    ({"exclusiveMinimum": True}, "/exclusiveMinimum"),
    ({"type": "string", "pattern": "("}, "/pattern"),
    ({"type": "string", "pattern": "\\"}, "/pattern"),
    ({"$ref": 1}, "/$ref"),
    ({"$ref": "https://example.com/schema"}, "/$ref"),
    ({"$ref": "#/$defs/missing"}, "/$ref"),
    ({"$ref": "#missing"}, "/$ref"),
    ({"multipleOf": 0}, "/multipleOf"),
]


@pytest.mark.parametrize(("schema", "place"), MALFORMED, ids=[json.dumps(schema) for schema, _ in MALFORMED])
def test_what_is_malformed_is_refused_by_its_place(schema: Any, place: str) -> None:
    with pytest.raises(ConstraintError) as refused:
        compiled_schema(schema)
    assert str(refused.value).startswith(f"{place}: ")


UNFULFILLABLE: list[Any] = [
    False,
    {"$ref": "#"},
    {"anyOf": [{"$ref": "#"}]},
    {"allOf": [{"$ref": "#"}, {"type": "object"}]},
    {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    {"type": "array", "items": {"$ref": "#"}, "minItems": 1},
    {"type": "integer", "minimum": 5, "maximum": 3},
    {"type": "integer", "exclusiveMinimum": 1, "exclusiveMaximum": 2},
    {"type": "string", "minLength": 3, "maxLength": 2},
    {"type": "string", "pattern": "[^\\s\\S]"},
    {"type": "string", "pattern": "^ab$", "maxLength": 1},
    {"type": "string", "enum": [1]},
    {"allOf": [{"type": "string"}, {"type": "integer"}]},
    {"type": "object", "properties": {"a": False}, "required": ["a"]},
    {"type": "object", "additionalProperties": False, "minProperties": 1},
    {"type": "array", "items": False, "minItems": 1},
]


@pytest.mark.parametrize("schema", UNFULFILLABLE, ids=json.dumps)
def test_what_nothing_fulfils_is_refused(schema: Any) -> None:
    with pytest.raises(ConstraintError, match=r"nothing fulfils it|there is no"):
        compiled_schema(schema)


def test_a_branch_that_never_ends_is_left_out() -> None:
    """The model could get into it, and would never come out again."""
    endless = {"type": "object", "properties": {"next": {"$ref": "#/anyOf/0"}}, "required": ["next"]}
    grammar = compiled_schema({"anyOf": [endless, {"type": "null"}]})
    assert lets_through(grammar, "null")
    assert not lets_through(grammar, '{"next":{"next":')
    assert not lets_through(grammar, "{")


OF_LIBRARIES: dict[str, tuple[Any, str, str]] = {
    "pydantic: optional, default, title": (
        {
            "title": "M",
            "type": "object",
            "properties": {
                "name": {"title": "Name", "type": "string"},
                "age": {"anyOf": [{"type": "integer", "exclusiveMinimum": 0}, {"type": "null"}], "default": None},
                "when": {"type": "string", "format": "date-time"},
                "tags": {"type": "object", "additionalProperties": {"type": "string"}},
                "pair": {"type": "array", "prefixItems": PAIR, "minItems": 2, "maxItems": 2},
            },
            "required": ["name"],
        },
        '{"name": "a", "age": null, "tags": {"x": "y"}, "pair": [1, "b"]}',
        '{"name": "a", "age": 0}',
    ),
    "pydantic: discriminated union with a default kind": (
        {
            "$defs": {
                "Cat": {
                    "type": "object",
                    "properties": {
                        "kind": {"const": "cat", "default": "cat", "type": "string"},
                        "lives": {"type": "integer"},
                    },
                },
                "Dog": {"type": "object", "properties": {"kind": {"const": "dog", "default": "dog", "type": "string"}}},
            },
            "type": "object",
            "properties": {
                "pet": {
                    "oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}],
                    "discriminator": {"propertyName": "kind", "mapping": {"cat": "#/$defs/Cat", "dog": "#/$defs/Dog"}},
                }
            },
            "required": ["pet"],
        },
        '{"pet": {"kind": "cat", "lives": 9}}',
        '{"pet": {"kind": "dog", "lives": 9}}',
    ),
    "pydantic: recursive": (
        {
            "$defs": {
                "Node": {
                    "type": "object",
                    "properties": {"children": {"type": "array", "items": {"$ref": "#/$defs/Node"}}},
                    "required": ["children"],
                }
            },
            "$ref": "#/$defs/Node",
        },
        '{"children": [{"children": []}]}',
        '{"children": [1]}',
    ),
    "zod: integer, union of literals, record": (
        {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "type": "object",
            "properties": {
                "n": {"type": "integer", "minimum": -9007199254740991, "maximum": 9007199254740991},
                "kind": {"anyOf": [{"type": "string", "const": "a"}, {"type": "string", "const": "b"}]},
                "counts": {
                    "type": "object",
                    "propertyNames": {"type": "string"},
                    "additionalProperties": {"type": "number"},
                },
                "id": {"type": "string", "format": "uuid", "pattern": "^([0-9a-f]{8}-[0-9a-f]{4})$"},
            },
            "required": ["n", "kind", "counts"],
            "additionalProperties": False,
        },
        '{"n": 1, "kind": "a", "counts": {"x": 1.5}, "id": "01234567-89ab"}',
        '{"n": 1, "kind": "c", "counts": {}}',
    ),
    "zod: intersection": (
        {
            "allOf": [
                {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]},
                {"type": "object", "properties": {"b": {"type": "number"}}, "required": ["b"]},
            ]
        },
        '{"a": "x", "b": 1}',
        '{"a": "x"}',
    ),
}


@pytest.mark.parametrize("name", OF_LIBRARIES)
def test_what_pydantic_and_zod_write_goes_on_working(name: str) -> None:
    schema, right, wrong = OF_LIBRARIES[name]
    jsonschema.validate(json.loads(right), schema)
    grammar = compiled_schema(schema)
    assert lets_through(grammar, right)
    assert not lets_through(grammar, wrong)


_LONG_NAME = "a_long_name" * 9
_CHAIN = {
    f"d{n}": {"type": ["object", "null"], "properties": {"a": {"$ref": f"#/$defs/d{n + 1}"}}} for n in range(40)
} | {"d40": {"type": "string"}}
OF_TOOLS: dict[str, tuple[Any, str, str]] = {
    "a long name beside free ones": (
        {**OBJECT, "properties": {_LONG_NAME: {"type": "null"}}, "additionalProperties": {"type": "integer"}},
        f'{{"{_LONG_NAME}": null, "{_LONG_NAME[:-1]}": 1, "": 2, "b": 3}}',
        f'{{"{_LONG_NAME}": 1}}',
    ),
    "a long string": ({"type": "string", "maxLength": 200_000}, '"a"', "1"),
    "definitions that lead deep": ({"$ref": "#/$defs/d0", "$defs": _CHAIN}, '{"a":{"a":null}}', '{"a":{"a":1}}'),
}


@pytest.mark.parametrize("name", OF_TOOLS)
def test_what_is_kept_can_be_read_a_second_time(name: str) -> None:
    """A demanded tool's schema is, as part of a structural tag."""
    schema, right, wrong = OF_TOOLS[name]
    tag = {"type": "structural_tag", "format": {"type": "json_schema", "json_schema": kept_schema(schema, "t0_")}}
    grammar = compiled(COMPILER, "STRUCTURAL_TAG", json.dumps(tag), None)
    assert lets_through(grammar, right)
    assert not lets_through(grammar, wrong)


@pytest.mark.parametrize(("max_whitespace", "longest"), [(2, 2), (0, 0), (5, 5), (None, 40)])
def test_white_space_between_tokens_of_json_has_a_bound(max_whitespace: int | None, longest: int) -> None:
    """A small model under a schema wrote blank lines until its last token."""
    for schema in (
        {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
        {"type": "object"},
        {"type": "object", "additionalProperties": {"type": "integer"}},
        {},
    ):
        grammar = compiled_schema(schema, max_whitespace)
        for before, after in (("{", '"a":1}'), ('{"a":', "1}"), ('{"a"', ":1}"), ('{"a":1', "}")):
            assert lets_through(grammar, before + "\n" * longest + after)
            if max_whitespace is not None:
                assert not lets_through(grammar, before + "\n" * (longest + 1) + after)
