"""Whole runs against a real HTTP server: asked once, scored, kept, resumed after a kill."""

import asyncio
import json
import math
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from gating.evaluation import client as client_module
from gating.evaluation.answers import sole_run
from gating.evaluation.benchmarks import BENCHMARKS, BenchmarkFile, BenchmarkOptions, prompt_version, run
from gating.evaluation.items import BenchmarkError
from tests.gating.evaluation.endpoint import MODEL, Endpoint, Reply, Script, serving
from tests.gating.evaluation.examples import ROWS, write_rows

NUM_PENS = len(ROWS["gsm8k"])


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "FIRST_PAUSE_SECONDS", 0.01)


def pens(question: str) -> int:
    """n, in the question about n pens."""
    return int(question.split()[2])


def right(question: str, _: int) -> Reply:
    """The right answer to a question about pens, in a sentence."""
    return Reply(f"She has {pens(question)} and as many more. The answer is {2 * pens(question)}.")


class Runner:
    """Runs benchmarks on the hand-written rows, in one output folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.output = folder / "output"

    def file(self, name: str) -> BenchmarkFile:
        return BenchmarkFile.parse(f"{name}={write_rows(self.folder / f'{name}.jsonl', ROWS[name])}")

    def __call__(self, endpoint: Endpoint, *names: str, **options: Any) -> dict[str, Any]:
        files = [self.file(name) for name in names]
        settings = BenchmarkOptions.model_validate({"output": self.output, "base_url": endpoint.base_url, **options})
        report = run(files, settings)
        assert report == json.loads((self.output / "results.json").read_text())
        return report["benchmarks"]

    def lines(self, *path: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.output.joinpath(*path).read_text().splitlines()]


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    return Runner(tmp_path)


def result_of(runner: Runner, name: str, script: Script, **options: Any) -> dict[str, Any]:
    with serving(script) as endpoint:
        return runner(endpoint, name, **options)[name]


def test_every_question_is_asked_once_and_scored(runner, capsys):
    with serving(lambda question, _: right(question, 0) if pens(question) % 4 else Reply("I do not know.")) as endpoint:
        result = runner(endpoint, "gsm8k")["gsm8k"]
    assert sorted(map(pens, endpoint.questions)) == list(range(600, 640))
    assert (result["metric"], result["value"], result["num_items"]) == ("accuracy", 0.75, 40)
    assert (result["low"], result["high"]) == pytest.approx((0.5981, 0.8581), abs=1e-4)
    assert (result["num_unanswered"], result["num_unparsable"]) == (0, 10)
    assert result["prompt_version"] == prompt_version(BENCHMARKS["gsm8k"])
    table = capsys.readouterr().err
    assert "accuracy  75.00  59.81 to 85.81  40     0           10" in table


def test_scores_are_kept_for_each_item(runner):
    result_of(runner, "gsm8k", right)
    scores = runner.lines("gsm8k", "scores.jsonl")
    assert len(scores) == NUM_PENS
    assert scores[0] == {"id": "1", "score": 1.0, "predicted": "1200", "expected": "1200"}


def test_no_more_requests_are_in_flight_than_allowed(runner):
    with serving(lambda question, _: Reply("1", wait_seconds=0.02)) as endpoint:
        runner(endpoint, "gsm8k", concurrency=3)
    assert endpoint.most_at_once == 3


def test_a_second_run_asks_nothing_and_gives_the_same(runner):
    first = result_of(runner, "gsm8k", right)
    with serving(right) as endpoint:
        assert runner(endpoint, "gsm8k")["gsm8k"] == first
    assert endpoint.asked == []


def test_failures_count_as_wrong_and_those_that_may_pass_are_asked_again(runner):
    def script(question: str, _: int) -> Reply:
        if pens(question) == 600:
            return Reply("too long", status=400)
        return Reply("broken", status=500) if pens(question) == 601 else right(question, 0)

    result = result_of(runner, "gsm8k", script)
    assert (result["value"], result["num_unanswered"]) == (38 / 40, 2)
    details = {score["id"]: score for score in runner.lines("gsm8k", "scores.jsonl")}
    assert (details["1"]["problem"], details["1"]["detail"]) == ("unanswered", "HTTP 400: too long")
    with serving(right) as endpoint:
        again = runner(endpoint, "gsm8k")["gsm8k"]
    assert [pens(question) for question in endpoint.questions] == [601]
    assert (again["value"], again["num_unanswered"]) == (39 / 40, 1)


def test_a_run_through_every_fault_loses_nothing(runner):
    faults = {
        0: Reply(status=429, headers={"Retry-After": "0.1"}),
        1: Reply(status=500),
        2: Reply(resets=True),
        3: Reply(raw=b'{"choices": [{"mess'),
    }

    def script(question: str, before: int) -> Reply:
        fault = faults.get(pens(question) % 8)
        return fault if fault is not None and before == 0 else right(question, 0)

    with serving(script) as endpoint:
        result = runner(endpoint, "gsm8k")["gsm8k"]
    assert (result["value"], result["num_unanswered"]) == (1.0, 0)
    asked = Counter(map(pens, endpoint.questions))
    assert all(asked[number] == (2 if number % 8 in faults else 1) for number in range(600, 640))


def test_a_server_that_hangs_costs_only_its_own_question(runner):
    def script(question: str, _: int) -> Reply:
        return Reply("0", wait_seconds=3.5) if pens(question) == 600 else right(question, 0)

    result = result_of(runner, "gsm8k", script, timeout_seconds=2.5)
    assert (result["value"], result["num_unanswered"]) == (39 / 40, 1)


def test_a_server_that_goes_away_ends_the_run_and_keeps_the_answers(runner):
    with serving(lambda *_: Reply()) as endpoint:

        def script(question: str, _: int) -> Reply:
            return Reply("wrong key", status=401) if len(endpoint.asked) > 20 else right(question, 0)

        endpoint.script = script
        with pytest.raises(BenchmarkError, match="api_key"):
            runner(endpoint, "gsm8k", concurrency=2)
    kept = {answer["id"] for answer in runner.lines("gsm8k", "answers.jsonl")}
    assert 19 <= len(kept) <= 20
    with serving(right) as endpoint:
        assert runner(endpoint, "gsm8k")["gsm8k"]["value"] == 1.0
    assert len(endpoint.asked) == NUM_PENS - len(kept)


def test_a_run_that_is_killed_is_gone_on_with_and_asks_nothing_twice(runner):
    def slow(question: str, _: int) -> Reply:
        return Reply(right(question, 0).text, wait_seconds=0.1)

    program = (
        "import sys; from pathlib import Path; from gating.evaluation.benchmarks import *; "
        "run([BenchmarkFile.parse(sys.argv[1])],"
        " BenchmarkOptions(output=Path(sys.argv[2]), base_url=sys.argv[3], concurrency=4))"
    )
    file, answers = runner.file("gsm8k"), runner.output / "gsm8k" / "answers.jsonl"
    with serving(slow) as endpoint:
        command = [sys.executable, "-c", program, f"gsm8k={file.path}", str(runner.output), endpoint.base_url]
        process = subprocess.Popen(command, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 60
        while not answers.exists() or answers.read_bytes().count(b"\n") < 10:
            assert process.poll() is None, process.stderr.read() if process.stderr else None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kept = {answer["id"] for answer in runner.lines("gsm8k", "answers.jsonl")}
        asked = len(endpoint.asked)
        assert 10 <= len(kept) < NUM_PENS
        assert asked - len(kept) <= 4  # what was running
        result = runner(endpoint, "gsm8k")["gsm8k"]
    later = endpoint.questions[asked:]
    assert {pens(question) - 599 for question in later} == set(range(1, NUM_PENS + 1)) - {int(id) for id in kept}
    assert len(later) == NUM_PENS - len(kept)
    assert (result["value"], result["num_items"]) == (1.0, NUM_PENS)
    assert len(runner.lines("gsm8k", "answers.jsonl")) == NUM_PENS


def test_a_torn_last_line_is_cut_off_and_asked_again(runner):
    first = result_of(runner, "gsm8k", right)
    path = runner.output / "gsm8k" / "answers.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    with serving(right) as endpoint:
        assert runner(endpoint, "gsm8k")["gsm8k"] == first
    assert len(endpoint.asked) == 1
    assert len(runner.lines("gsm8k", "answers.jsonl")) == NUM_PENS


def test_a_broken_line_in_the_middle_is_named(runner):
    result_of(runner, "gsm8k", right)
    path = runner.output / "gsm8k" / "answers.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], '{"id": "2"}', *lines[2:], ""]))
    with serving(right) as endpoint, pytest.raises(BenchmarkError, match=r"answers\.jsonl:2: not an answer"):
        runner(endpoint, "gsm8k")


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"model": "other"}, "model 'scripted', now it is 'other'"),
        ({"limit": 5}, "limit None, now it is 5"),
        ({"seed": 1}, "seed 0, now it is 1"),
        ({"chain_of_thought": True}, "chain_of_thought False, now it is True"),
        ({"max_tokens": 9}, "max_tokens 512, now it is 9"),
    ],
)
def test_a_folder_of_other_settings_is_refused(runner, changes, names):
    result_of(runner, "svamp", lambda *_: Reply("36"))
    refusal = pytest.raises(BenchmarkError, match=f"output: .* holds answers with {names}; name another folder")
    with serving(lambda *_: Reply("36")) as endpoint, refusal:
        runner(endpoint, "svamp", **changes)
    assert endpoint.asked == []


def test_a_folder_of_another_prompt_or_other_data_is_refused(runner, monkeypatch):
    result_of(runner, "svamp", lambda *_: Reply("36"))
    with serving(lambda *_: Reply("36")) as endpoint:
        monkeypatch.setitem(ROWS, "svamp", ROWS["svamp"][:1])
        with pytest.raises(BenchmarkError, match="holds answers with data 'sha256:"):
            runner(endpoint, "svamp")
        monkeypatch.undo()
        monkeypatch.setattr("gating.evaluation.benchmarks.prompt_version", lambda _: "new")
        with pytest.raises(BenchmarkError, match="holds answers with prompt_version"):
            runner(endpoint, "svamp")
    assert endpoint.asked == []


def test_another_benchmark_in_the_same_folder_joins_the_results(runner):
    result_of(runner, "svamp", lambda *_: Reply("36"))
    with serving(lambda *_: Reply("B")) as endpoint:
        results = runner(endpoint, "aqua")
    assert (results["svamp"]["value"], results["aqua"]["value"]) == (0.5, 1.0)


def test_two_runs_do_not_share_a_folder_at_the_same_time(runner):
    with (
        serving(right) as endpoint,
        sole_run(runner.output),
        pytest.raises(BenchmarkError, match="another run writes to"),
    ):
        runner(endpoint, "gsm8k")


def test_a_limit_asks_the_same_questions_of_every_model(runner, tmp_path):
    asked = []
    for model in ("one", "two"):
        with serving(right) as endpoint:
            runner.output = tmp_path / model
            result = runner(endpoint, "gsm8k", model=model, limit=7)["gsm8k"]
        assert result["num_items"] == 7
        assert {body["model"] for body in endpoint.asked} == {model}
        asked.append(sorted(endpoint.questions))
    assert asked[0] == asked[1]
    assert len(asked[0]) == 7


def test_a_chain_of_thought_is_asked_for(runner):
    with serving(lambda *_: Reply("The answer is 36.")) as endpoint:
        runner(endpoint, "svamp", chain_of_thought=True)
    assert all(question.endswith("\nLet's think step by step.") for question in endpoint.questions)


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
    with serving(right) as endpoint:
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


def test_a_benchmark_named_twice_is_refused(runner):
    with serving(right) as endpoint, pytest.raises(BenchmarkError, match="named twice"):
        runner(endpoint, "svamp", "svamp")


def test_the_prompts_of_every_benchmark_have_a_version_of_their_own_text():
    versions = [prompt_version(benchmark) for benchmark in BENCHMARKS.values()]
    assert all(len(version) == 8 for version in versions)
    assert prompt_version(BENCHMARKS["humaneval"]) != prompt_version(BENCHMARKS["mbpp"])


def test_a_run_works_within_an_event_loop_too(runner):
    from gating.evaluation.benchmarks import run_benchmarks

    with serving(lambda *_: Reply("36")) as endpoint:
        options = BenchmarkOptions(output=runner.output, base_url=endpoint.base_url)
        report = asyncio.run(run_benchmarks([runner.file("svamp")], options))
    assert report["benchmarks"]["svamp"]["value"] == 0.5
    assert report["model"] == MODEL
