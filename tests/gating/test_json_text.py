"""JSON that others wrote: a value that breaks nothing later, or the field and what is wrong with it."""

import pytest

from ultrafuser.gating.json_text import MAX_DEPTH, MAX_DIGITS, JsonError, parse_json


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"a": "\\ud83d"}', r"^a: has half of a surrogate pair \(\\ud83d\), which is no text$"),
        (b'{"m": [{"role": "\\uDC00 x"}]}', r"^m\.0\.role: has half of a surrogate pair \(\\udc00\)"),
        (b'{"m": {"\\ud83d": 1}}', r"^m\.'\\ud83d': has half of a surrogate pair"),
        (b'"\\ude00\\ud83d"', r"^has half of a surrogate pair \(\\ude00\)"),
        (b'{"a": "\xed\xa0\xbd"}', r"^not JSON \(not UTF-8: byte 8\)$"),
        (b'{"a": {"n": -' + b"7" * 5000 + b"}}", r"^a\.n: a number of 5,000 digits is too long$"),
        (b"9" * 5000, r"^a number of 5,000 digits is too long$"),
        (b'{"a": ' + b"9" * 5000, r"^not JSON \("),
        (b'{"a": 1, "deep": ' + b"[" * 100_000, r"^deep: arrays and objects are nested more than 100 deep$"),
        (b'{"a":' * 5000, r"^a: arrays and objects are nested"),
        (b"[" * 100_000, r"^arrays and objects are nested"),
        (b'{"a": 1, "b": {"a": 2, "a": 3}}', r"^a: the key is there twice$"),
        (b'{"a": "\x00"}', r"^not JSON \(Invalid control character"),
        (b"", r"^not JSON \("),
        (b'{"a": "' + b'\\"[' * 5000, r"^not JSON \(Unterminated string"),
        (b'{"a": "' + b"[" * 5000 + b"\\", r"^not JSON \(Unterminated string"),
        (b'{"a": 1}{"a": 1}', r"^not JSON \(Extra data"),
    ],
)
def test_what_cannot_be_used_is_told_with_its_field(content: bytes, reason: str) -> None:
    with pytest.raises(JsonError, match=reason) as caught:
        parse_json(content)
    assert "\n" not in str(caught.value)
    str(caught.value).encode()  # it can be printed


@pytest.mark.parametrize(
    ("content", "value"),
    [
        (b'{"a": "\\ud83d\\ude00"}', {"a": "\U0001f600"}),
        (b'\xef\xbb\xbf{"a": [1.5, null]}', {"a": [1.5, None]}),
        (b"7" * MAX_DIGITS, int("7" * MAX_DIGITS)),
        (b'"' + b"7" * 5000 + b'"', "7" * 5000),
        (b'{"a": "' + b"[{" * 5000 + b'"}', {"a": "[{" * 5000}),
        (b"[" * MAX_DEPTH + b"]" * MAX_DEPTH, None),
        (b"[" + b"[]," * 5000 + b"[]]", [[]] * 5001),
    ],
)
def test_what_can_be_used_is_its_value(content: bytes, value: object) -> None:
    found = parse_json(content)
    assert value is None or found == value


def test_line_breaks_within_texts_are_taken_where_a_model_wrote_them() -> None:
    assert parse_json('{"a": "b\nc"}', allows_line_breaks=True) == {"a": "b\nc"}
    with pytest.raises(JsonError, match="Invalid control character"):
        parse_json('{"a": "b\nc"}')
