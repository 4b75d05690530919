"""Which part of an answer's text is which token's, however text and tokens come."""

import pytest

from ultrafuser.server.terminal.pieces import Aligner, Piece, Token, leader_of, mean_weights

ONE, TWO = (0.75, 0.25), (0.25, 0.75)


def tokens(*names: str) -> list[Token]:
    """Tokens by turns of the first and the second specialist."""
    return [Token(name, (ONE, TWO)[index % 2]) for index, name in enumerate(names)]


def test_several_tokens_of_one_event_share_its_text() -> None:
    aligner = Aligner()
    assert aligner.push(tokens("A", " prime", " is"), "A prime is") == [
        Piece("A", ONE),
        Piece(" prime", TWO),
        Piece(" is", ONE),
    ]
    assert aligner.finish() == []


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([(("\ufffd", "\ufffd", "é"), "é")], ["", "", "é"]),  # tokens that begin a character
        ([(("Yes", "<|im_end|>"), "Yes")], ["Yes", ""]),  # the end is not shown
        ([((" Yes",), "Yes")], ["Yes"]),  # a leading space that the tokenizer drops
        ([(("a",), ""), (("b",), ""), (("c",), "abc")], ["a", "b", "c"]),  # held back: a stop string might begin
        ([(("Hel",), "H"), ((), "el")], ["Hel"]),
        ([((), "no tokens")], ["no tokens"]),
        ([(("x",), "something else")], ["something else"]),
    ],
)
def test_the_text_is_the_truth_and_every_token_has_its_part(
    events: list[tuple[tuple[str, ...], str]], expected: list[str]
) -> None:
    aligner = Aligner()
    pieces = [piece for names, text in events for piece in aligner.push(tokens(*names), text)] + aligner.finish()
    assert [piece.text for piece in pieces] == expected
    assert "".join(expected) == "".join(text for _, text in events)


def test_means_count_every_token_that_has_weights() -> None:
    assert mean_weights([Piece("a", ONE), Piece("", TWO), Piece("b", None)]) == [0.5, 0.5]
    assert mean_weights([Piece("a", None)]) == []


def test_the_first_of_equals_leads() -> None:
    assert [leader_of(weights) for weights in ((0.5, 0.5), (0.2, 0.8), (0.3, 0.3, 0.4))] == [0, 1, 2]
