"""AQuA (Ling et al. 2017) and SAT-Math (Zhong et al. 2023, AGIEval): questions with lettered options. Accuracy."""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from ultrafuser.gating.errors import DataError
from ultrafuser.gating.evaluation.benchmarks.items import Answer, Benchmark, HubSource, Item, Row, Verdict
from ultrafuser.gating.evaluation.benchmarks.parsing import option_letter
from ultrafuser.gating.evaluation.benchmarks.word_problems import CHAIN_OF_THOUGHT

# What is to be done comes first: after a question that ends in it small models often say nothing at all.
_PROMPT = "Choose the correct option and answer with its letter.\n\nQuestion: {question}\nOptions:\n{options}"
_LETTERS = "ABCDEFGH"


def _item(row: Row, question: str, correct: str, chain_of_thought: bool) -> Item:
    options = [re.sub(rf"^\(?[{_LETTERS}]\)\s*", "", option) for option in row.texts("options")]
    letters = _LETTERS[: len(options)]
    if correct not in letters:
        raise DataError(
            f"{row.source}:{row.number}: the right option is {correct!r}, but there are {letters}; correct the file"
        )
    listed = "\n".join(f"({letter}) {option}" for letter, option in zip(letters, options, strict=True))
    prompt = _PROMPT.format(question=question, options=listed) + CHAIN_OF_THOUGHT * chain_of_thought
    return Item.asked_once(str(row.number), prompt, {"answer": correct, "letters": letters})


def _read_aqua(row: Row, chain_of_thought: bool) -> Item:
    return _item(row, row.text("question"), row.text("correct"), chain_of_thought)


def _read_sat_math(row: Row, chain_of_thought: bool) -> Item:
    passage = row.text("passage", may_be_empty=True).strip()
    question = f"{passage}\n{row.text('question')}" if passage else row.text("question")
    return _item(row, question, row.text("label"), chain_of_thought)


def _convert_agieval(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The hub's copies hold a whole prompt, "Q: ... Answer Choices: ...", and the right option's index."""
    question = row["query"].removeprefix("Q:").rpartition("Answer Choices:")[0].strip()
    return {"passage": "", "question": question, "options": row["choices"], "label": _LETTERS[row["gold"][0]]}


def _judge(item: Item, answers: Sequence[Answer]) -> Verdict:
    expected = item.reference["answer"]
    letter = option_letter(answers[0].texts[-1], item.reference["letters"])
    if letter is None:
        return Verdict(item.id, 0.0, None, expected, "unparsable", "no option's letter in the answer")
    return Verdict(item.id, float(letter == expected), letter, expected)


_multiple_choice = partial(Benchmark, prompts=(_PROMPT, CHAIN_OF_THOUGHT), metric="accuracy", judge=_judge)

AQUA = _multiple_choice(name="aqua", hub=HubSource("deepmind/aqua_rat", "test", config="raw"), read=_read_aqua)
SAT_MATH = _multiple_choice(
    name="sat_math", hub=HubSource("hails/agieval-sat-math", "test", convert=_convert_agieval), read=_read_sat_math
)
