"""What a server's answers score, benchmark by benchmark, and how those of the others are written out."""

import json
import math
import time

import pytest

from tests.gating.evaluation.endpoint import MODEL, Reply, serving
from tests.gating.evaluation.runner import result_of


def test_letters_are_scored(runner):
    def script(question: str, _: int) -> Reply:
        return Reply("(C) 3" if "x+2=5" in question else "The answer is (A).")

    result = result_of(runner, "sat_math", script)
    assert (result["metric"], result["value"], result["num_unparsable"]) == ("accuracy", 0.5, 0)


def yes_with(share: float) -> Reply:
    """An answer whose first token is Yes with this share of the mass of Yes and No together."""
    top = [
        {"token": token, "logprob": math.log(mass)}
        for token, mass in (("Yes", 0.8 * share), (" no", 0.8 * (1 - share)))
    ]
    return Reply("Yes", tokens=[{"token": "Yes", "logprob": 0.0, "top_logprobs": top}])


WEIGHTS = {"Ice is colder.": 0.9, "Steam is hotter.": 0.3, "Both are equal.": 0.2, "Ice is hotter.": 0.6}
WEIGHTS |= {"They meow.": 0.8, "They bark.": 0.2}


def option(question: str) -> str:
    return question.split("Answer: ")[1].split(" Is the answer correct?")[0]


def test_mc2_is_the_share_of_yes_on_true_options_averaged_over_questions(runner):
    result = result_of(runner, "truthfulqa", lambda question, _: yes_with(WEIGHTS[option(question)]))
    assert result["metric"] == "mc2"
    assert result["value"] == pytest.approx((1.2 / 2.0 + 0.8 / 1.0) / 2)
    assert (result["low"], result["high"]) == pytest.approx((0.6, 0.8))
    assert result["judgement_accuracy"]["value"] == pytest.approx(4 / 6)
    assert (result["num_items"], result["num_unanswered"], result["num_unparsable"]) == (2, 0, 0)


def test_without_logprobs_the_text_decides(runner):
    def script(question: str, _: int) -> Reply:
        return Reply("Yes." if WEIGHTS[option(question)] > 0.5 else "No, it is not.")

    result = result_of(runner, "truthfulqa", script)
    assert result["value"] == pytest.approx((1 / 2 + 1) / 2)
    assert result["judgement_accuracy"]["value"] == pytest.approx(4 / 6)


def test_an_option_without_a_judgement_counts_as_misjudged(runner):
    def script(question: str, _: int) -> Reply:
        if option(question) == "They bark.":
            return Reply("no room", status=400)
        return Reply("Perhaps") if option(question) == "Steam is hotter." else yes_with(WEIGHTS[option(question)])

    result = result_of(runner, "truthfulqa", script)
    assert result["value"] == pytest.approx((0.9 / 1.7 + 0.8 / 1.8) / 2)
    assert (result["num_unanswered"], result["num_unparsable"]) == (1, 1)
    assert result["judgement_accuracy"]["value"] == pytest.approx(3 / 6)


def test_a_question_whose_options_are_all_denied_scores_nothing(runner):
    assert result_of(runner, "truthfulqa", lambda *_: Reply("No"))["value"] == 0.0


CODE = {
    "humaneval": "```python\ndef half_root(x):\n    return math.sqrt(x) / 2\n```",
    "mbpp": "def double(x):\n    return 2 * x",
}


@pytest.mark.parametrize("name", list(CODE))
def test_programs_are_run_only_when_that_is_asked_for(runner, name, capsys):
    result = result_of(runner, name, lambda *_: Reply(CODE[name]))
    assert (result["metric"], result["value"], result["num_items"]) == ("pass@1", None, 1)
    assert "--execute-code" in result["note"]
    assert result["note"] in capsys.readouterr().err
    assert not (runner.output / name / "scores.jsonl").exists()
    with serving(lambda *_: Reply()) as endpoint:
        scored = runner(endpoint, name, execute_code=True)[name]
    assert endpoint.asked == []
    assert (scored["value"], scored["num_items"]) == (1.0, 1)


@pytest.mark.parametrize("name", list(CODE))
def test_a_program_that_fails_its_tests_scores_nothing(runner, name):
    wrong = CODE[name].replace("2", "3")
    assert result_of(runner, name, lambda *_: Reply(wrong), execute_code=True)["value"] == 0.0
    assert runner.lines(name, "scores.jsonl")[0]["detail"].startswith("AssertionError")


def test_mt_bench_answers_are_written_as_fastchat_reads_them(runner):
    def script(question: str, _: int) -> Reply:
        return Reply("no room", status=400) if question == "Double it." else Reply(f"to {question}")

    result = result_of(runner, "mt_bench", script)
    assert (result["metric"], result["value"], result["num_unanswered"]) == (None, None, 1)
    lines = runner.lines(*result["written"].split("/"))
    assert [line["question_id"] for line in lines] == [3, 4]
    assert all(set(line) == {"question_id", "answer_id", "model_id", "choices", "tstamp"} for line in lines)
    assert lines[0]["choices"] == [{"index": 0, "turns": ["to Name a river.", "to Name another one."]}]
    assert lines[1]["choices"] == [{"index": 0, "turns": ["to What is 2+2?", "$ERROR$"]}]
    assert lines[0]["model_id"] == MODEL
    assert lines[0]["answer_id"] != lines[1]["answer_id"]
    assert abs(lines[0]["tstamp"] - time.time()) < 60


def test_alpaca_eval_answers_are_written_as_its_judge_reads_them(runner):
    result = result_of(runner, "alpaca_eval", lambda question, _: Reply("Water." if "rain" in question else "In half."))
    assert (result["metric"], result["value"], result["num_items"]) == (None, None, 2)
    assert json.loads((runner.output / result["written"]).read_text()) == [
        {"instruction": "How do I fold a shirt?", "output": "In half.", "generator": MODEL, "dataset": "own"},
        {"instruction": "What is rain?", "output": "Water.", "generator": MODEL, "dataset": "own"},
    ]
