"""Whole runs against a real HTTP server: asked once, scored, kept, resumed after a kill."""

import asyncio
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest

from tests.gating.evaluation.endpoint import MODEL, Reply, serving
from tests.gating.evaluation.examples import ROWS
from tests.gating.evaluation.runner import result_of
from ultrafuser.gating.commands.run_folder import sole_run
from ultrafuser.gating.errors import CommandError
from ultrafuser.gating.evaluation.benchmarks.benchmarks import BENCHMARKS, prompt_version, run_benchmarks

NUM_PENS = len(ROWS["gsm8k"])


def pens(question: str) -> int:
    """n, in the question about n pens."""
    return int(question.split()[2])


def right(question: str, _: int) -> Reply:
    """The right answer to a question about pens, in a sentence."""
    return Reply(f"She has {pens(question)} and as many more. The answer is {2 * pens(question)}.")


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
        with pytest.raises(CommandError, match="api_key"):
            runner(endpoint, "gsm8k", concurrency=2)
    kept = {answer["id"] for answer in runner.lines("gsm8k", "answers.jsonl")}
    assert 19 <= len(kept) <= 20
    with serving(right) as endpoint:
        assert runner(endpoint, "gsm8k")["gsm8k"]["value"] == 1.0
    assert len(endpoint.asked) == NUM_PENS - len(kept)


def test_a_run_that_is_killed_is_gone_on_with_and_asks_nothing_twice(runner):
    def slow(question: str, _: int) -> Reply:
        return Reply(right(question, 0).text, wait_seconds=0.1)

    answers = runner.output / "gsm8k" / "answers.jsonl"
    with serving(slow) as endpoint:
        (file,) = runner.settings(endpoint, "gsm8k").benchmark
        command = [
            sys.executable,
            "-m",
            "ultrafuser.server",
            "eval",
            "--benchmark",
            file,
            "--output",
            str(runner.output),
        ]
        command += ["--base-url", endpoint.base_url, "--concurrency", "4"]
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
    with serving(right) as endpoint, pytest.raises(CommandError, match=r"answers\.jsonl:2: not an answer"):
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
    refusal = pytest.raises(CommandError, match=f"output: .* was made with {names}; name another folder")
    with serving(lambda *_: Reply("36")) as endpoint, refusal:
        runner(endpoint, "svamp", **changes)
    assert endpoint.asked == []


def test_a_folder_of_another_prompt_or_other_data_is_refused(runner, monkeypatch):
    result_of(runner, "svamp", lambda *_: Reply("36"))
    with serving(lambda *_: Reply("36")) as endpoint:
        monkeypatch.setitem(ROWS, "svamp", ROWS["svamp"][:1])
        with pytest.raises(CommandError, match="was made with data 'sha256:"):
            runner(endpoint, "svamp")
        monkeypatch.undo()
        monkeypatch.setattr("ultrafuser.gating.evaluation.benchmarks.benchmarks.prompt_version", lambda _: "new")
        with pytest.raises(CommandError, match="was made with prompt_version"):
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
        pytest.raises(CommandError, match="another run writes to"),
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


def test_a_benchmark_named_twice_is_refused(runner):
    with serving(right) as endpoint, pytest.raises(CommandError, match="named twice"):
        runner(endpoint, "svamp", "svamp")


def test_the_prompts_of_every_benchmark_have_a_version_of_their_own_text():
    versions = [prompt_version(benchmark) for benchmark in BENCHMARKS.values()]
    assert all(len(version) == 8 for version in versions)
    assert prompt_version(BENCHMARKS["humaneval"]) != prompt_version(BENCHMARKS["mbpp"])


def test_a_run_works_within_an_event_loop_too(runner):
    with serving(lambda *_: Reply("36")) as endpoint:
        report = asyncio.run(run_benchmarks(runner.settings(endpoint, "svamp")))
    assert report["benchmarks"]["svamp"]["value"] == 0.5
    assert report["model"] == MODEL
