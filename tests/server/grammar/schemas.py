"""Schemas and regular expressions drawn at random, right and wrong ones."""

from typing import Any

from hypothesis import strategies as st

NAMES = st.sampled_from(["a", "b", "ab", 'q"', "\u00e9"])
VALUES: st.SearchStrategy[Any] = st.sampled_from(
    [0, 1, -3, 2.5, 1e22, "a", "abc", 'é"\\\n', "", None, True, {"a": 1}, [1, 2], [], {"b": {}}],
)
RIGHT = [
    "a",
    "b",
    "[a-c]",
    "[^a]",
    "\\d",
    "\\w",
    "\\s",
    "\\S",
    ".",
    "\\.",
    '"',
    "\\\\",
    "é",
    "(a|b)",
    "(?:ab)",
    "^",
    "$",
    "x|y",
]
WRONG = ["\\p{L}", "(?=a)", "(?<!a)", "\\b", "(", "[", "\\", "[^\\s\\S]", "\\1", "{", "(?i)"]
PIECES = st.sampled_from([*RIGHT, *RIGHT, *WRONG])
COUNTS = st.sampled_from(["", "", "", "*", "+", "?", "{2}", "{1,3}", "{0,}", "{3,1}", "**"])
EXPRESSIONS = st.one_of(
    st.lists(st.tuples(PIECES, COUNTS).map("".join), max_size=4).map("".join),
    st.lists(st.tuples(PIECES, COUNTS).map("".join), max_size=3).map(lambda parts: f"^{''.join(parts)}$"),
)
"""Expressions put together from pieces."""

_COUNT = st.integers(-1, 4)
_NUMBER = st.sampled_from([-5, -1, 0, 0.5, 1, 2.5, 3, 7, 10, 99.5, 1000, 1e6, 1e30])
_TYPE = st.sampled_from(["object", "array", "string", "integer", "number", "null", "boolean"])
_REFERENCE = st.sampled_from(["#", "#/$defs/x", "#/$defs/y", "#/properties/a", "#/nowhere", "#name"])


def _keywords(inner: st.SearchStrategy[Any]) -> dict[str, st.SearchStrategy[Any]]:
    schemas = st.lists(inner, min_size=1, max_size=3)
    named = st.dictionaries(NAMES, inner, min_size=1, max_size=3)
    return {
        "enum": st.lists(VALUES, max_size=4),
        "const": VALUES,
        "multipleOf": st.sampled_from([1, 2, 3, 0.5, 7, 0]),
        **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), _NUMBER),
        **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"), _COUNT),
        "pattern": EXPRESSIONS,
        "format": st.sampled_from(["date", "email", "ipv6", "word"]),
        "items": inner,
        "prefixItems": schemas,
        "uniqueItems": st.booleans(),
        "contains": inner,
        "minContains": _COUNT,
        "unevaluatedItems": inner,
        "properties": named,
        "required": st.lists(NAMES, max_size=2),
        "additionalProperties": inner,
        "patternProperties": st.dictionaries(EXPRESSIONS, inner, max_size=1),
        "propertyNames": inner,
        "unevaluatedProperties": inner,
        "dependentRequired": st.dictionaries(NAMES, st.lists(NAMES, max_size=1), max_size=1),
        "dependentSchemas": st.dictionaries(NAMES, inner, max_size=1),
        **dict.fromkeys(("allOf", "anyOf", "oneOf"), schemas),
        **dict.fromkeys(("not", "if", "then", "else"), inner),
        "$ref": _REFERENCE,
        "$anchor": st.just("name"),
        "title": st.just("title"),
    }


@st.composite
def _with_type(draw: st.DrawFn, inner: st.SearchStrategy[Any]) -> dict[str, Any]:
    keywords = _keywords(inner)
    names = draw(st.lists(st.sampled_from(sorted(keywords)), max_size=4, unique=True))
    schema = {name: draw(keywords[name]) for name in names}
    own_type = draw(st.one_of(st.none(), _TYPE, _TYPE, _TYPE, st.lists(_TYPE, min_size=1, max_size=2, unique=True)))
    return schema if own_type is None else {"type": own_type, **schema}


_LEAVES = st.one_of(st.booleans(), _TYPE.map(lambda name: {"type": name}), VALUES.map(lambda value: {"const": value}))
_INNER = st.recursive(_LEAVES, _with_type, max_leaves=4)


@st.composite
def schemas(draw: st.DrawFn) -> dict[str, Any]:
    """A schema with two definitions, of which about half can be kept."""
    schema = draw(_with_type(_INNER))
    return {**schema, "$defs": {"x": draw(_INNER), "y": draw(_LEAVES)}}
