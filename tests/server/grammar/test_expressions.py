"""Regular expressions are kept as ECMAScript and Python read them alike, or refused with a position."""

import json
import re
from itertools import product

import pytest

from tests.server.grammar.walks import COMPILER, compiled_schema, lets_through
from ultrafuser.server.grammar.compiling import compiled
from ultrafuser.server.grammar.errors import ConstraintError
from ultrafuser.server.grammar.expression_parser import parse_whole
from ultrafuser.server.grammar.expressions import matches

SAMPLES = ["", "a", "b", "ab", "ba", "aa", "abab", "ab12", "12", "3", " ", "-", "a-b", "é", "😀", "ax", "A", "_", "a b"]
KEPT = [
    "a", "a|b", "^a", "b$", "^a|b$", "^(a|b)+$", "(?:ab){2}", "(?<n>ab)", "[a-c]*", "[^a]", "[^a-z0-9]",
    "\\d+", "^\\D$", "\\w", "^\\W$", "\\s", "^\\S+$", "^.$", ".*", "", "^$", "a{2}", "a{1,}", "a{1,2}b",
    "a+?b", "[\\w-]+", "[a\\-b]", "\\x61", "\\u0061", "\\.", "^[é]$", "^[\\u{1F600}]$", "(a|)b", "a-b",
]  # fmt: skip


def readings(pattern: str) -> list["re.Pattern[str]"]:
    """The pattern with the classes of ASCII, as ECMAScript has them, and with those of Unicode, as Python has them."""
    python = pattern.replace("(?<", "(?P<").replace("\\u{1F600}", "\\U0001F600")
    return [re.compile(python, re.ASCII), re.compile(python)]


@pytest.mark.parametrize("pattern", KEPT)
def test_a_pattern_finds_what_is_found_in_every_reading(pattern: str) -> None:
    grammar = compiled_schema({"type": "string", "pattern": pattern})
    for sample in SAMPLES:
        found = all(read.search(sample) for read in readings(pattern))
        assert lets_through(grammar, json.dumps(sample, ensure_ascii=False)) == found, sample


@pytest.mark.parametrize("pattern", [pattern for pattern in KEPT if not re.search(r"[|(]\^", pattern)])
def test_a_regex_matches_the_whole_response(pattern: str) -> None:
    grammar = compiled(COMPILER, "REGEX", pattern, None)
    for sample in SAMPLES:
        assert lets_through(grammar, sample) == all(read.fullmatch(sample) for read in readings(pattern)), sample


REFUSED = {
    "\\p{L}+": "a Unicode property",
    "[\\p{L}]": "a Unicode property",
    "(?=a)b": "lookahead",
    "a(?!b)": "lookahead",
    "(?<=a)b": "lookbehind",
    "(?<!a)b": "lookbehind",
    "\\": "a lone \\",
    "a\\": "a lone \\",
    "(": "not closed",
    ")": "unmatched )",
    "[": "not closed",
    "[]": "an empty class",
    "*": "nothing to repeat",
    "a**": "a repetition of a repetition",
    "a++": "a repetition of a repetition",
    "a{3,1}": "bounds are swapped",
    "a{": "a lone {",
    "a{,2}": "a lone {",
    "[b-a]": "ends are swapped",
    "[\\d-z]": "a range between classes",
    "(?i)a": "not supported",
    "(?P<n>a)": "not supported",
    "\\bfoo": "a word boundary",
    "(a)\\1": "a reference to a group",
    "\\q": "unknown",
    "\\x4": "hexadecimal",
    "\\u12": "hexadecimal",
    "\\u{110000}": "hexadecimal",
    "a^b": "at the expression's edges only",
    "a{100001}": "more than 100000 times",
    "[[:alpha:]]": "POSIX",
    "(" * 200 + ")" * 200: "deep",
    "[^\\s\\S]": "nothing matches it",
    "\\ud800": "nothing matches it",
}


@pytest.mark.parametrize("pattern", REFUSED, ids=lambda pattern: pattern[:12])
def test_what_cannot_be_kept_is_refused_with_its_reason(pattern: str) -> None:
    with pytest.raises(ConstraintError, match=re.escape(REFUSED[pattern])):
        compiled(COMPILER, "REGEX", pattern, None)


def test_bytes_that_are_no_characters_are_not_let_through() -> None:
    """The library takes overlong bytes and surrogates for characters; decoded they are three, and a length is wrong."""
    grammar = compiled_schema({"type": "string", "maxLength": 1})
    for data in (b"\xe0\x80\x80", b"\xed\xa0\x80", b"\xf0\x80\x80\x80", b"\xf4\x90\x80\x80", b"\xc0\x80"):
        assert not lets_through(grammar, b'"' + data + b'"')
    for character in ("é", "\u07fe", "\u0801", "\ud7ff", "\ue000", "😀", "\U0010ffff"):
        assert lets_through(grammar, f'"{character}"')


LENGTHS = [
    ("^[a-z]+@[a-z]+$", 5, 8, ["abc@d", "abcd@efg"], ["a@b", "abcde@fghi"]),
    ("^(ab)+$", 3, 6, ["abab", "ababab"], ["ab", "abababab"]),
    ("^a*|b{2,}$", 2, 3, ["aa", "bb", "bbb"], ["a", "aaaa", "bbbb"]),
    ("x", 2, None, ["ax", "axa"], ["x"]),
]


@pytest.mark.parametrize(("pattern", "low", "high", "right", "wrong"), LENGTHS)
def test_a_length_beside_a_pattern_holds(
    pattern: str, low: int, high: int | None, right: list[str], wrong: list[str]
) -> None:
    bounds = {"minLength": low} | ({} if high is None else {"maxLength": high})
    grammar = compiled_schema({"type": "string", "pattern": pattern, **bounds})
    assert all(lets_through(grammar, f'"{text}"') for text in right)
    assert not any(lets_through(grammar, f'"{text}"') for text in wrong)


@pytest.mark.parametrize(
    "pattern", ["", "a*b", "(a|ab)(b|)", "(a*)*b", "(?:ab?){2,3}", "(|a){3}", "[^a]{2,}", "(a{2}){1,2}"]
)
def test_a_tree_matches_what_its_expression_matches(pattern: str) -> None:
    for length in range(7):
        for text in map("".join, product("ab", repeat=length)):
            assert matches(parse_whole(pattern), text) == (re.fullmatch(pattern, text) is not None), text


def test_matching_a_long_text_needs_no_backtracking() -> None:
    assert not matches(parse_whole("(a*)*b"), "a" * 200)
    assert matches(parse_whole("a{150}.*b.*"), "a" * 5_000 + "b")
