"""GSM8K (Cobbe et al. 2021) and SVAMP (Patel et al. 2021): word problems whose answer is a number. Accuracy."""

from collections.abc import Sequence
from functools import partial

from ultrafuser.gating.errors import DataError
from ultrafuser.gating.evaluation.benchmarks.items import NUMBER, Answer, Benchmark, HubSource, Item, Row, Verdict
from ultrafuser.gating.evaluation.benchmarks.parsing import final_number, same_number

CHAIN_OF_THOUGHT = "\nLet's think step by step."
"""Appended to a prompt, as in the paper."""

_PROMPT = "{question}"


def _item(id: str, question: str, answer: str, chain_of_thought: bool) -> Item:
    prompt = _PROMPT.format(question=question) + CHAIN_OF_THOUGHT * chain_of_thought
    return Item.asked_once(id, prompt, {"answer": answer})


def _read_gsm8k(row: Row, chain_of_thought: bool) -> Item:
    question, solution = row.text("question"), row.text("answer")
    answer = solution.rpartition("####")[2].strip().replace(",", "")
    if not NUMBER.fullmatch(answer):
        raise DataError(f"{row.source}:{row.number}: answer: must end in '#### NUMBER'; correct the file")
    return _item(str(row.number), question, answer, chain_of_thought)


def _read_svamp(row: Row, chain_of_thought: bool) -> Item:
    body, question = row.text("Body").strip(), row.text("Question").strip()
    # Many bodies lack their full stop.
    body += "" if body[-1] in ".,!?;:" else "."
    return _item(row.identity("ID"), f"{body} {question}", row.number_text("Answer"), chain_of_thought)


def _judge(item: Item, answers: Sequence[Answer]) -> Verdict:
    expected = item.reference["answer"]
    number = final_number(answers[0].texts[-1])
    if number is None:
        return Verdict(item.id, 0.0, None, expected, "unparsable", "no number in the answer")
    return Verdict(item.id, float(same_number(number, expected)), f"{float(number):.12g}", expected)


_word_problems = partial(Benchmark, prompts=(_PROMPT, CHAIN_OF_THOUGHT), metric="accuracy", judge=_judge)

GSM8K = _word_problems(name="gsm8k", hub=HubSource("openai/gsm8k", "test", config="main"), read=_read_gsm8k)
SVAMP = _word_problems(name="svamp", hub=HubSource("ChilleD/SVAMP", "test"), read=_read_svamp)
