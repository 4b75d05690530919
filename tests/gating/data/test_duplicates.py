"""Of texts that say the same, the first one stays."""

import random

import pytest

from tests.gating.synthesis.model import WORDS
from ultrafuser.gating.data.duplicates import EXACT, NEAR, Duplicates, Repeat, find_duplicates


def drop(*texts: str, threshold: float = 0.7) -> dict[str, str]:
    return find_duplicates(((str(place), text) for place, text in enumerate(texts)), threshold, lambda: None)


def test_case_marks_and_spaces_make_no_difference():
    assert drop("What is a prime number?", "what is  a prime number", "Was ist eine Primzahl?") == {"1": EXACT}


def test_a_word_that_was_changed_makes_a_near_duplicate():
    texts = (
        "Write a Python function that returns the largest even number in a list of integers.",
        "Write a Python function that returns the smallest even number in a list of integers.",
        "Write a haiku about the largest even number that a Python may find in a list of mice.",
    )
    assert drop(*texts) == {"1": NEAR}
    assert drop(*texts, threshold=0.95) == {}


@pytest.mark.parametrize("threshold", [0.01, 0.5, 0.97, 1.0])
def test_every_threshold_works(threshold):
    """1.0 had left the index without bands."""
    texts = ("Why is the sea salt?", "Why is the sea salt", "Name ten rivers of Europe.", "Why is the sea salt!?")
    assert drop(*texts, threshold=threshold) == {"1": EXACT, "3": EXACT}


def test_texts_too_short_for_five_characters_in_a_row_are_compared_too():
    assert drop("Why?", "Why", "How?", "") == {"1": EXACT}


def test_among_many_different_texts_every_planted_one_is_found_and_no_other():
    source = random.Random(0)
    texts = [" ".join(source.choices(WORDS, k=14)) for _ in range(1500)]
    planted = {f"{place} planted": f"{texts[place]} once" for place in range(0, 1500, 10)}
    pairs = [*((str(place), text) for place, text in enumerate(texts)), *planted.items()]
    assert find_duplicates(pairs, 0.7, lambda: None) == dict.fromkeys(planted, NEAR)


def test_a_repeat_names_the_text_that_stays_also_if_it_repeats_one_that_was_dropped():
    text = "Write a Python function that returns the largest even number in a list of integers."
    duplicates = Duplicates(0.7)
    found = [duplicates.find(str(place), own) for place, own in enumerate((text, f"{text} Now.", f"{text} Now!", text))]
    assert found == [None, Repeat(NEAR, "0"), Repeat(EXACT, "0"), Repeat(EXACT, "0")]
