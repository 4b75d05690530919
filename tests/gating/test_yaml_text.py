"""YAML that users wrote: no key is given twice, and whatever cannot be read is one line."""

import pytest

from ultrafuser.gating.yaml_text import YamlError, parse_yaml


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("a: 1\nb: 2\na: 3", "^line 3: 'a' is given twice, first in line 1$"),
        ("x:\n  - a: 1\n    b: 2\n    b: 2", "^line 4: 'b' is given twice, first in line 3$"),
        ("a: 1\n'a': 1", "^line 2: 'a' is given twice"),
        ("x: {a: 1, a: 2}", "^line 1: 'a' is given twice, first in line 1$"),
        ("base: &b {a: 1}\nx:\n  <<: *b\n  <<: *b", "^line 4: '<<' is given twice"),
        ("a: [", "expected the node content"),
        ("a: " + "9" * 5000, "integer string conversion"),
        ("a: 2020-99-99", "month must be in"),
        ("[" * 900, "^nested too deeply$"),
        ("a: !!python/name:os.system", "could not determine a constructor"),
        ("a: \x01", "special characters are not allowed"),
    ],
)
def test_what_cannot_be_used_is_one_line(content: str, reason: str) -> None:
    with pytest.raises(YamlError, match=reason) as caught:
        parse_yaml(content.encode())
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_one_line() -> None:
    with pytest.raises(YamlError, match="can't decode byte"):
        parse_yaml(b"a: \xff")


def test_a_key_may_replace_one_that_was_merged_and_stand_in_several_mappings() -> None:
    text = "base: &b {a: 1, c: 1}\nx:\n  <<: *b\n  a: 2\ny:\n  <<: *b\n"
    assert parse_yaml(text.encode())["x"] == {"a": 2, "c": 1}
