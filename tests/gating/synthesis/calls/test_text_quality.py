"""What is rejected, and what only looks like it."""

import pytest

from ultrafuser.gating.synthesis.calls.text_quality import is_language, is_refusal, response_problem, text_problem
from ultrafuser.gating.synthesis.stages.domain import Limits

LIMITS = Limits(response_min=3, response=500)
ENGLISH = "The tide comes in twice a day, because the moon pulls at the water on both sides of the earth."
GERMAN = "Die Flut kommt zweimal am Tag, weil der Mond das Wasser auf beiden Seiten der Erde anzieht."


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't assist with that request.",
        "I\u2019m sorry, but I can\u2019t help with that.",
        "I cannot provide instructions for this.",
        "As an AI language model, I do not have opinions.",
        "I'm sorry, but as an AI I have no access to files.",
        "I apologize, but I am unable to provide this.",
        "Sorry, I can't do that.",
        "Unfortunately, I cannot answer this question.",
        "I'm unable to write that.",
    ],
)
def test_refusals_are_known_by_how_they_begin(text):
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry to hear that. Put some ice on it.",
        "Sorry seems to be the hardest word is a song by Elton John.",
        "You can say: I can't help you with that.",
        "I can provide three examples.",
        "As an aid to memory, write it down.",
        "Unfortunately the train was late, so he walked.",
        "I cannot be expressed as a fraction, said the square root of two.",
        "def i_cannot(): ...",
    ],
)
def test_answers_that_begin_in_a_like_way_are_no_refusals(text):
    assert not is_refusal(text)


@pytest.mark.parametrize(
    ("text", "finish_reason", "problem"),
    [
        (ENGLISH, "stop", ""),
        (ENGLISH, "length", "truncated"),
        (ENGLISH, "content_filter", "refusal"),
        ("I cannot help with that.", "stop", "refusal"),
        ("", "stop", "too_short"),
        ("word " * 101, "stop", "too_long"),
        (GERMAN, "stop", "language"),
    ],
)
def test_a_response_is_rejected_with_its_reason(text, finish_reason, problem):
    assert response_problem(text, finish_reason, LIMITS, "en") == problem


@pytest.mark.parametrize(
    "text",
    [
        ENGLISH,
        "42",
        "Paris.",
        "```python\nfuer = [wert for wert in werte if nicht_leer(wert) and gueltig(wert)]\n```",
        "$$\\int_0^\\infty e^{-x^2} dx = \\frac{\\sqrt{\\pi}}{2}$$",
        f"How do I say this in English?\n`{GERMAN}`",
    ],
)
def test_code_formulas_and_short_answers_have_no_language(text):
    assert is_language(text, "en")


def test_any_language_is_taken_where_none_is_named():
    assert text_problem(GERMAN, 1, 500, "en") == "language"
    assert text_problem(GERMAN, 1, 500, "de") == text_problem(GERMAN, 1, 500, None) == ""
