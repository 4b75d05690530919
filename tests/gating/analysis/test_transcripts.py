"""Tokens as text: pieces that join to the response, characters of several tokens, turns, which ones are shown."""

import numpy as np
import pytest

from tests.fakes import EOS_ID, build_tokenizer
from tests.gating.analysis.readings import reading_of
from ultrafuser.gating.analysis.transcripts import choose, positions_in_responses, show, split_text

TEXTS = {
    "ascii": "the rest\n\tin here",
    "cjk": "a 中文 b",
    "emoji": "so \U0001f600\U0001f468\u200d\U0001f469!",
    "combining": "cafe\u0301 na\u00efve",
    "genuine replacement characters": "x\ufffd\ufffdy\U0001f600\ufffd",
    "only one character": "\U0001f600",
}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(320, 336, "text")


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_pieces_join_to_the_text(tokenizer, text):
    ids = [*tokenizer.encode(text, add_special_tokens=False), EOS_ID]
    pieces = split_text(tokenizer, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text + "<|im_end|>"
    assert pieces[-1] == "<|im_end|>"


def test_a_character_of_several_tokens_is_given_to_the_one_that_completes_it(tokenizer):
    assert split_text(tokenizer, tokenizer.encode("z中\U0001f600", add_special_tokens=False)) == [
        "z", "", "", "中", "", "", "", "\U0001f600"
    ]  # fmt: skip


def test_a_response_that_was_cut_within_a_character_keeps_what_it_decodes_to(tokenizer):
    ids = tokenizer.encode("ab\U0001f600", add_special_tokens=False)[:-1]
    pieces = split_text(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids) == "ab\ufffd"


def test_a_token_that_ends_within_a_character_gives_what_comes_before_it():
    class Merged:
        """Bytes whose first two are one token, as large vocabularies have them."""

        parts = (b" \xe4", b"\xb8", b"\xad!")

        def decode(self, ids, **_):
            return b"".join(self.parts[index] for index in ids).decode("utf-8", "replace")

    assert split_text(Merged(), [0, 1, 2]) == [" ", "", "中!"]


def test_a_decoder_that_drops_the_first_space_loses_no_other():
    class Stripping:
        """As of SentencePiece vocabularies: each word has its space before it, and the first one's is dropped."""

        def decode(self, ids, **_):
            return "".join(f" w{index}" for index in ids)[1:]

    assert split_text(Stripping(), [0, 1, 2, 3]) == ["w0", " w1", " w2", " w3"]


def test_a_decoder_that_takes_back_a_space_gives_the_following_tokens_their_own_text():
    class Cleaning:
        """As decoders do that write no space before a mark."""

        def decode(self, ids, **_):
            return "".join(("a ", "!", " b", "c")[index] for index in ids).replace(" !", "!")

    assert split_text(Cleaning(), [0, 1, 2, 3]) == ["a", "!", " b", "c"]


def test_turns_are_a_prompt_and_a_response_each_with_the_readings_numbers(tokenizer):
    first, second = [[*tokenizer.encode(text, add_special_tokens=False), EOS_ID] for text in ("Yes.", "No!")]
    glue = [tokenizer.encode(text, add_special_tokens=False) for text in ("Is it? ", " And now? ")]
    ids = [*glue[0], *first, *glue[1], *second]
    mask = [bool(flag) for own, flag in ((glue[0], 0), (first, 1), (glue[1], 0), (second, 1)) for _ in own]
    count = len(first) + len(second)
    weights = [[index / 10, 1 - index / 10] for index in range(count)]
    reading = reading_of([("text", [[0.5, 0.5]] * 3), ("code", weights)], ("text", "code"))
    shown = show(reading, "code", 1, 1, {"input_ids": [ids], "response_mask": [mask]}, tokenizer)
    assert [turn.prompt for turn in shown.turns] == ["Is it? ", " And now? "]
    texts = ["".join(token.text for token in turn.tokens) for turn in shown.turns]
    assert texts == ["Yes.<|im_end|>", "No!<|im_end|>"]
    assert [list(token.weights) for token in shown.tokens] == weights
    assert [token.leader for token in shown.tokens] == [int(index < 5) for index in range(count)]
    assert shown.mean_weights == pytest.approx(np.mean(weights, axis=0))
    assert positions_in_responses(mask) == [*range(len(first)), *range(len(second))]


def test_conversations_are_drawn_from_every_domain_the_same_for_the_same_seed():
    reading = reading_of([("text", [[1, 0]])] * 9 + [("code", [[0, 1]])] * 2, ("text", "code"))
    chosen = choose(reading, 3, seed=1)
    assert [domain for domain, _, _ in chosen] == ["text"] * 3 + ["code"] * 2
    assert [reading.domains[domain][number - 1] for domain, number, _ in chosen] == [place for _, _, place in chosen]
    assert choose(reading, 3, seed=1) == chosen
    assert len({tuple(choose(reading, 3, seed=seed)) for seed in range(20)}) > 1
