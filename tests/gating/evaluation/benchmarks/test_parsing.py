"""Numbers, letters, yes and no, in the many forms in which models write them."""

import math
from fractions import Fraction

import pytest

from ultrafuser.gating.evaluation.benchmarks.parsing import (
    final_number,
    option_letter,
    same_number,
    yes_or_no,
    yes_probability,
)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("18", 18),
        ("The answer is 18.", 18),
        ("He has 3 left.\n#### 1,234", 1234),
        ("#### 12 apples, of 20", 12),
        ("She makes $18.50 a day", 18.5),
        ("It is -10", -10),
        ("so x = \u22123 degrees", -3),
        ("He owes -$10", -10),
        ("He owes $-10", -10),
        ("16-3", 3),
        ("- 3 apples", 3),
        ("The answer is: **$1,000**.", 1000),
        ("\\boxed{\\$42} of them", 42),
        ("Thus $\\boxed{1{,}200}$, which is 12 times 100", 1200),
        ("The final answer is: $\\boxed{5}$. I am 100% sure", 5),
        ("Answer: 3 + 4 = 7 apples", 7),
        ("The answer is $5 + 3 = 8$ dollars", 8),
        ("The answer is 7 dollars (since x = 3)", 7),
        ("The answer is 18 because she sold 9 of them", 18),
        ("First, the answer is 4.\nNo: the answer is 5. There were 6 of them", 5),
        ("The answer to question 2 is 45", 45),
        ("The answer is clear: 6 x 7 = 42", 42),
        ("So 25% of them", 25),
        ("half, that is .5", 0.5),
        ("1/2", 0.5),
        ("That makes 5,000,000 in all", 5_000_000),
        ("12 eggs,13 hens", 13),
        ("about 2.5e3 metres", 2500),
        ("the 3rd of 4", 4),
    ],
)
def test_the_final_number_is_found_in_many_written_forms(text, number):
    assert final_number(text) == Fraction(number)


@pytest.mark.parametrize("text", ["", "no number here", "x2 and v3", "The answer is unknown."])
def test_text_without_a_number_has_no_final_number(text):
    assert final_number(text) is None


def test_numbers_are_compared_by_value_and_not_by_writing():
    assert same_number(Fraction("18.00"), "18")
    assert same_number(Fraction(1, 3), "0.333333333")
    assert same_number(Fraction(2125), "2,125")
    assert not same_number(Fraction("18.01"), "18")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(B)", "B"),
        ("(b).", "B"),
        ("**B**", "B"),
        ("B) 12", "B"),
        ("B. 12\n\nSince C is too large", "B"),
        ("The answer is (B)", "B"),
        ("The answer is B because it is larger", "B"),
        ("The correct answer is:\n\n**C) 12**", "C"),
        ("Answer\nB", "B"),
        ("answer: d", "D"),
        ("So the answer would be option E.", "E"),
        ("Answer: **A) 5**", "A"),
        ("The answer is A", "A"),
        ("\\boxed{C}", "C"),
        ("$\\boxed{\\text{C}}$", "C"),
        ("Choice C is correct", "C"),
        ("The correct choice is (B) 12, not (C)", "B"),
        ("I choose D.", "D"),
        ("E is the correct answer", "E"),
        ("Therefore (D) follows", "D"),
        ("The value is 5, so it is C", "C"),
        ("P(A) = 0.2 and P(B) = 0.3.\nA", "A"),
        ("(A) 5: wrong\n(B) 6: right\n(C) 7: wrong\nSo the answer is B.", "B"),
        ("The answer is (A).\nNo, wait. The answer is (D).", "D"),
    ],
)
def test_an_options_letter_is_found_in_many_written_forms(text, letter):
    assert option_letter(text, "ABCDE") == letter


@pytest.mark.parametrize(
    "text",
    [
        "",
        "A train travels 5 km.",
        "The answer is a train",
        "The answer is 24 km.",
        "(A) 5\n(B) 6\n(C) 7",
        "F",
        "Be brave",
    ],
)
def test_no_letter_is_read_where_none_was_chosen(text):
    assert option_letter(text, "ABCDE") is None


def test_a_letter_beyond_the_options_is_no_choice():
    assert option_letter("The answer is E.", "ABCD") is None


def test_all_spellings_of_yes_and_no_count_for_their_word():
    candidates = [
        ("Yes", 0.3),
        (" yes", 0.2),
        ("YES", 0.1),
        ("No", 0.1),
        ("\u0120no", 0.05),
        ("\u2581No", 0.05),
        ("The", 0.2),
    ]
    logprobs = [(token, math.log(share)) for token, share in candidates]
    assert yes_probability(logprobs) == pytest.approx(0.6 / 0.8)


def test_words_that_only_begin_like_yes_or_no_do_not_count():
    assert yes_probability([("Not", -0.1), ("Yesterday", -0.2), ("N", -0.3)]) is None
    assert yes_probability([("Yes", -3.0), ("Not", -0.1)]) == 1.0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Yes", True),
        ("No, it is not.", False),
        ("**Yes**", True),
        ("\nThe answer is Yes.", True),
        ("The answer is correct: no", False),
        ("Yes and no", True),
        ("It is neither yes nor no", None),
        ("Perhaps", None),
        ("", None),
    ],
)
def test_yes_or_no_is_read_from_text(text, said):
    assert yes_or_no(text) is said
