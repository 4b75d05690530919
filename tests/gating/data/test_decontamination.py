"""Runs of words that a text shares with a test set."""

import json
import unicodedata
from pathlib import Path

import pytest

from ultrafuser.gating.data.decontamination import RUN, Hit, Index, TestSet

NUMBERS = [f"word{number}" for number in range(15)]


def index_of(path: Path, *texts: str) -> Index:
    path.write_text("".join(f"{json.dumps({'q': text})}\n" for text in texts))
    return Index([TestSet.parse(f"bench={path}")])


def test_a_run_is_found_wherever_it_stands_in_either_text(tmp_path):
    index = index_of(tmp_path / "b.jsonl", " ".join(NUMBERS))
    for begin in range(len(NUMBERS) - RUN + 1):
        run = NUMBERS[begin : begin + RUN]
        for text in (run, ["nil", *run], ["nil", "nought", *run, "nil"]):
            assert index.find("... ".join(text).upper()) == Hit("bench", 1, " ".join(run))
        for wrong in range(RUN):
            assert index.find(" ".join([*run[:wrong], "nil", *run[wrong + 1 :]])) is None


@pytest.mark.parametrize("size", [6, 9, 12])
def test_a_short_text_is_found_whole_and_the_line_is_the_first_that_has_it(size, tmp_path):
    short = " ".join(NUMBERS[:size])
    index = index_of(tmp_path / "b.jsonl", "none of these", short, short, " ".join(NUMBERS[1:]))
    assert index.find(f"And {short}?") == Hit("bench", 2, short)
    assert index.find(" ".join(NUMBERS[: size - 1])) is None


def test_accents_and_widths_are_the_same_however_they_are_encoded(tmp_path):
    text = "où le café était-il fermé à six heures, et pourquoi l'élève y allait-elle"
    index = index_of(tmp_path / "b.jsonl", text)
    assert index.find(unicodedata.normalize("NFD", text)) is not None
    wide = "".join(chr(ord(letter) + 0xFEE0) if letter.isascii() and letter.isalpha() else letter for letter in text)
    assert index.find(wide) is not None


def test_characters_are_the_words_of_scripts_without_spaces(tmp_path):
    """A sentence was once a single word, and no test set in Chinese could be used."""
    index = index_of(tmp_path / "b.jsonl", "小明有五个苹果 他又买了三个 现在一共有几个")
    found = index.find("题目 小明有五个苹果, 他又买了三个, 现在一共有几个. 答案是八")
    assert found is not None
    assert found.run.split()[:4] == ["小", "明", "有", "五"]
    assert index.find("小红有五个苹果 他又吃了三个 现在还剩下几个") is None
