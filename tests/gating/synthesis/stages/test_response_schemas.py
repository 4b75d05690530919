"""Structured answers are asked for strictly and read forgivingly."""

import jsonschema  # type: ignore[import-untyped]
import pytest

from ultrafuser.gating.synthesis.stages.domain import Limits
from ultrafuser.gating.synthesis.stages.response_schemas import (
    MISSING,
    Entry,
    UnusableError,
    instruction_schema,
    instructions_schema,
    message_schema,
    related_schema,
    sub_topics_schema,
    topics_schema,
)

LIMITS = Limits(topic=20, note=30, instruction_min=3, instruction=40)
TWO = instructions_schema(2, LIMITS)


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        (topics_schema(2, LIMITS), {"topics": ["a", "b"]}, {"topics": ["a"]}),
        (sub_topics_schema(1, LIMITS), {"sub_topics": [{"name": "a", "note": "b"}]}, {"sub_topics": [{"name": "a"}]}),
        (TWO, {"instructions": ["abc", "def"]}, {"instructions": ["abc", "de"]}),
        (related_schema(1, 1, LIMITS), {"strong": ["abc"], "weak": ["abc"]}, {"strong": ["abc"], "weak": []}),
        (related_schema(1, 0, LIMITS), {"strong": ["abc"]}, {"strong": ["abc"], "weak": []}),
        (instruction_schema(LIMITS), {"instruction": "abc"}, {"instruction": "x" * 41}),
        (message_schema(LIMITS), {"message": "abc"}, {"message": "abc", "more": 1}),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_the_schema_fits_the_answer_exactly_and_what_fits_can_be_read(schema, good, bad):
    jsonschema.Draft202012Validator.check_schema(schema.json_schema)
    jsonschema.validate(good, schema.json_schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(bad, schema.json_schema)
    assert schema.read(str(good).replace("'", '"'))


@pytest.mark.parametrize(
    "text",
    [
        '{"instructions": ["one", "two"]}',
        '```json\n{"instructions": ["one", "two"]}\n```',
        'Sure! Here they are: {"instructions": [" one ", "two", "three"]} Good luck!',
        '{"instructions": ["one", "", "two"], "note": "done"}',
        '{"instructions": [\n"one\n", "two"]}',
    ],
)
def test_what_is_around_an_object_does_no_harm(text):
    assert TWO.read(text) == [Entry("one"), Entry("two")]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no JSON object"),
        ("I will not.", "no JSON object"),
        ('{"instructions": ["one", "two"', "no JSON object"),
        ('{"instructions": ["one" "two"]}', "not valid JSON"),
        ('{"instructions": "one"}', "instructions: Input should be a valid list"),
        ('{"instructions": ["one", 2]}', r"instructions\.1: Input should be a valid string"),
        ('{"requests": ["one", "two"]}', "instructions: Field required"),
        ('{"instructions": ["one"]}', "1 of 2 entries are missing"),
        ("{" * 100_000 + "}", "not valid JSON"),
    ],
)
def test_what_cannot_be_read_is_told_with_its_reason(text, reason):
    with pytest.raises(UnusableError, match=reason):
        TWO.read(text)


def test_a_list_that_stays_too_short_is_filled_up_with_rejected_entries():
    assert TWO.read('{"instructions": ["one"]}', may_lack=True) == [Entry("one"), Entry("", reject=MISSING)]
    with pytest.raises(UnusableError, match="2 of 2 entries are missing"):
        TWO.read('{"instructions": []}', may_lack=True)


def test_topics_are_told_apart_by_their_names():
    assert topics_schema(2, LIMITS).read('{"topics": ["a", "a", "b\\nc"]}') == [Entry("a"), Entry("b c")]


def test_places_of_weak_instructions_do_not_depend_on_the_number_of_strong_ones():
    schema = related_schema(2, 1, LIMITS)
    entries = schema.read('{"strong": ["one"], "weak": ["two"]}', may_lack=True)
    assert entries == [
        Entry("one", relation="strong"),
        Entry("", relation="strong", reject=MISSING),
        Entry("two", relation="weak"),
    ]
