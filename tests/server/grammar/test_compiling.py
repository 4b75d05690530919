"""Constraints of every kind: what the library raises, and what it lets pass but nothing fulfils, is one error."""

import json
from typing import Any

import pytest

from tests.server.grammar.walks import COMPILER, lets_through
from ultrafuser.server.grammar.compiling import compiled
from ultrafuser.server.grammar.errors import ConstraintError


def tag(content: dict[str, Any]) -> str:
    """A structural tag with this content."""
    return json.dumps(
        {"type": "structural_tag", "format": {"type": "tag", "begin": "<a>", "content": content, "end": "</a>"}}
    )


def schema_tag(schema: Any, **more: Any) -> str:
    """One whose content follows a schema."""
    return tag({"type": "json_schema", "json_schema": schema, **more})


REFUSED: list[tuple[str, str, str]] = [
    ("JSON", "{", "not JSON"),
    ("JSON", "[]", "must be an object"),
    ("JSON", json.dumps({"not": {"minimum": 3}}), "/not: cannot be kept"),
    ("JSON", "[" * 200 + "]" * 200, "must be an object"),
    ("JSON", '{"not":' * 100 + "{}" + "}" * 100, "nest more than"),
    ("GRAMMAR", "root ::= y", "not defined"),
    ("GRAMMAR", "", "root rule"),
    ("GRAMMAR", 'root ::= "a" root', "cannot be fulfilled"),
    ("GRAMMAR", "root ::= root", "cannot be fulfilled"),
    ("GRAMMAR", 'root ::= "a" | "b" [^\\u0000-\\U0010ffff]', "cannot be fulfilled"),
    ("GRAMMAR", 'root ::= "a" | "b" x\nx ::= "c" x', "cannot be fulfilled"),
    ("LARK", "start: (", ""),
    ("LARK", 'start: "a" start', "cannot be fulfilled"),
    ("CHOICE", "[]", "at least one choice"),
    ("CHOICE", '["\\ud800"]', "surrogate"),
    ("STRUCTURAL_TAG", "3", "must be an object"),
    ("STRUCTURAL_TAG", "{}", ""),
    ("STRUCTURAL_TAG", '{"structures": [{}], "triggers": []}', "not of the form"),
    ("STRUCTURAL_TAG", '{"structures": []}', "not of the form"),
    ("STRUCTURAL_TAG", schema_tag({"$ref": "#"}), "/format/content/json_schema: the schema: nothing fulfils it"),
    ("STRUCTURAL_TAG", schema_tag({"not": {"minimum": 3}}), "/format/content/json_schema: /not: cannot be kept"),
    ("STRUCTURAL_TAG", tag({"type": "regex", "pattern": "(?=a)"}), "/format/content/pattern: lookahead"),
    ("STRUCTURAL_TAG", tag({"type": "grammar", "grammar": "root ::= root"}), "cannot be fulfilled"),
]


@pytest.mark.parametrize(("kind", "text", "reason"), REFUSED, ids=[f"{k}-{n}" for n, (k, *_) in enumerate(REFUSED)])
def test_whatever_is_wrong_is_one_kind_of_error(kind: str, text: str, reason: str) -> None:
    with pytest.raises(ConstraintError) as refused:
        compiled(COMPILER, kind, text, 2)
    assert reason in str(refused.value)
    assert ".cc:" not in str(refused.value)
    assert str(refused.value).strip()


KEPT: list[tuple[str, str, list[str], list[str]]] = [
    ("GRAMMAR", 'root ::= "a" root | "b"', ["b", "aab"], ["a"]),
    ("GRAMMAR", 'root ::= root "a" | "b"', ["b", "baa"], ["a"]),
    ("LARK", "start: A\nA: /[a-z]+/", ["abc"], ["1"]),
    ("CHOICE", json.dumps(["red", 'b"\\\n', "", "é"]), ["red", 'b"\\\n', "", "é"], ["re"]),
    ("JSON_OBJECT", "", ['{"a": [1, {}]}'], ["[1]", "1"]),
    ("STRUCTURAL_TAG", schema_tag({"type": "integer", "allOf": [{"minimum": 3}]}), ["<a>3</a>"], ["<a>2</a>", "3"]),
    ("STRUCTURAL_TAG", schema_tag({"type": "array"}), ["<a>[  1]</a>"], ["<a>[   1]</a>"]),
    ("STRUCTURAL_TAG", schema_tag({"type": "array"}, max_whitespace_cnt=None), ["<a>[  1]</a>"], ["<a>[   1]</a>"]),
    ("STRUCTURAL_TAG", tag({"type": "regex", "pattern": "^a+$"}), ["<a>aa</a>"], ["<a></a>"]),
    (
        "STRUCTURAL_TAG",
        json.dumps({"structures": [{"begin": "<a>", "schema": {"enum": ["x"]}, "end": "</a>"}], "triggers": ["<a"]}),
        ['b<a>"x"</a>c', ""],
        ['<a>"y"</a>'],
    ),
]


@pytest.mark.parametrize(("kind", "text", "right", "wrong"), KEPT, ids=[f"{k}-{n}" for n, (k, *_) in enumerate(KEPT)])
def test_a_constraint_of_every_kind_is_kept(kind: str, text: str, right: list[str], wrong: list[str]) -> None:
    grammar = compiled(COMPILER, kind, text, 2)
    for own in right:
        assert lets_through(grammar, own), own
    for own in wrong:
        assert not lets_through(grammar, own), own
