"""A run makes all that was planned, once, whatever the server does and however often the run is ended."""

import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.gating.evaluation.endpoint import Reply
from tests.gating.synthesis.model import answer, schema_of, serving_model
from tests.gating.synthesis.runs import contents_of, misses_of, records_of, run, settings_of, write_domain
from ultrafuser.gating.commands.run_folder import sole_run
from ultrafuser.gating.errors import CommandError, EndpointError
from ultrafuser.gating.synthesis.calls.runner import MOST_REFUSED
from ultrafuser.gating.synthesis.stages.records import identify
from ultrafuser.server.__main__ import EXIT_WRONG_INPUT, main

PLANNED = {"meta_topics": 2, "sub_topics": 4, "instructions": 8, "related": 16, "responses": 48}
"""Calls of the tiny run, apart from those whose number is drawn."""


def counts_of(folder: Path) -> Counter[str]:
    return Counter(record.stage for record in records_of(folder).values())


def test_every_stage_makes_what_was_planned(tmp_path):
    with serving_model() as endpoint:
        ending = run(settings_of(tmp_path, endpoint, turns=2, turn_share=0.5))
    counts = counts_of(tmp_path)
    assert {stage: counts[stage] for stage in PLANNED} == PLANNED
    assert 5 <= counts["complications"] <= 25
    assert counts["user_turns_1"] == counts["responses_1"] > counts["user_turns_2"] == counts["responses_2"] > 0
    assert len(endpoint.asked) == counts.total()
    assert (ending.is_stopped, ending.num_failed) == (False, 0)
    assert ending.report == json.loads((tmp_path / "report.json").read_text())
    assert ending.report["stages"]["instructions"] == {"calls": 8, "items": 16, "rejected": {}, "missed": {}}


def test_every_record_has_its_lineage(tmp_path):
    with serving_model() as endpoint:
        run(settings_of(tmp_path, endpoint, turns=1, turn_share=1.0))
    records = records_of(tmp_path)
    owners = {item.id: record for record in records.values() for item in record.items}
    for record in records.values():
        if record.stage != "meta_topics":
            parent = owners[record.parent]
            assert (parent.domain, parent.sub_topic or record.sub_topic) == (record.domain, record.sub_topic)
    ends = [record for record in records.values() if record.stage == "responses_1"]
    assert len(ends) == 48
    for record in ends:
        assert [message.role for message in record.messages] == ["user", "assistant", "user"]
        first = next(item for item in owners[record.root].items if item.id == record.root)
        assert (record.messages[0].content == first.text) != record.is_complex
        assert record.relation == first.relation


def test_a_share_of_the_instructions_is_answered_in_a_more_complex_form(tmp_path):
    with serving_model() as endpoint:
        run(settings_of(tmp_path, endpoint, instructions=20))
    responses = [record for record in records_of(tmp_path).values() if record.stage == "responses"]
    assert len(responses) == 480
    assert 0.24 < sum(record.is_complex for record in responses) / 480 < 0.36


def test_what_is_asked_does_not_depend_on_how_many_calls_are_made_at_a_time(tmp_path):
    folders = [tmp_path / "one", tmp_path / "many"]
    for folder, concurrency in zip(folders, (1, 32), strict=True):
        with serving_model() as endpoint:
            run(settings_of(folder, endpoint, concurrency=concurrency, turns=1))
    assert contents_of(folders[0]) == contents_of(folders[1])


def test_another_seed_makes_other_data(tmp_path):
    with serving_model() as endpoint:
        run(settings_of(tmp_path / "a", endpoint))
        run(settings_of(tmp_path / "b", endpoint, seed=1))
    assert contents_of(tmp_path / "a").keys().isdisjoint(contents_of(tmp_path / "b"))


def test_a_run_that_was_killed_at_any_moment_goes_on_without_loss(tmp_path):
    """SIGKILL, again and again, each time a little later, until a run comes to its end."""
    with serving_model(lambda body, before: time.sleep(0.01)) as endpoint:
        run(settings_of(tmp_path / "whole", endpoint, turns=1))
    num_kills = 0
    with serving_model(lambda body, before: time.sleep(0.02)) as endpoint:
        while num_kills < 20:
            kept = contents_of(tmp_path / "killed")
            command = ["make", str(tmp_path / "killed"), "--domain", "text", "code", "--base-url", endpoint.base_url]
            counts = ["--meta-topics", "2", "--sub-topics", "2", "--instructions", "2", "--strong", "1", "--weak", "1"]
            counts += ["--turns", "1", "--concurrency", "8"]
            process = subprocess.Popen(
                [sys.executable, "-m", "ultrafuser.server", "data", *command, *counts],
                stderr=subprocess.DEVNULL,
            )
            goal = len(endpoint.asked) + 45
            while process.poll() is None and len(endpoint.asked) < goal:
                time.sleep(0.005)
            process.kill()
            if process.wait() == 0:
                break
            num_kills += 1
            assert kept.items() <= contents_of(tmp_path / "killed").items()
    assert num_kills >= 2
    assert contents_of(tmp_path / "killed") == contents_of(tmp_path / "whole")
    assert len(endpoint.asked) <= len(contents_of(tmp_path / "whole")) + 8 * num_kills


def test_a_finished_folder_asks_nothing_more(tmp_path):
    with serving_model() as endpoint:
        run(settings_of(tmp_path, endpoint))
        num_asked = len(endpoint.asked)
        run(settings_of(tmp_path, endpoint))
        assert len(endpoint.asked) == num_asked


def test_a_folder_of_another_plan_is_refused(tmp_path):
    with serving_model() as endpoint:
        run(settings_of(tmp_path, endpoint))
        for changes in ({"strong": 2}, {"instructions": 3}, {"domain": ("text",)}, {"seed": 1}):
            with pytest.raises(CommandError, match=r"was made with .*; name another folder"):
                run(settings_of(tmp_path, endpoint, **changes))


# Answers that cannot be used


def broken(body: dict[str, Any], before: int) -> Reply | None:
    """Sends half of the JSON, to every call for instructions, for the first time."""
    is_first = len(body["messages"]) == 1 and "instructions" in str(schema_of(body))
    return Reply(answer(body).text[:40], usage={"prompt_tokens": 7, "completion_tokens": 5}) if is_first else None


def test_an_answer_that_cannot_be_read_is_asked_for_once_more_with_the_reason(tmp_path):
    with serving_model(broken) as endpoint:
        run(settings_of(tmp_path, endpoint))
    assert counts_of(tmp_path)["instructions"] == 8
    repairs = [body for body in endpoint.asked if len(body["messages"]) == 3]
    assert len(repairs) == 8
    assert repairs[0]["messages"][1]["role"] == "assistant"
    assert "That cannot be used: it is no JSON object" in repairs[0]["messages"][2]["content"]
    assert len({body["seed"] for body in endpoint.asked}) == len(endpoint.asked)
    record = next(record for record in records_of(tmp_path).values() if record.stage == "instructions")
    assert record.prompt_tokens > 7
    assert record.completion_tokens > 5


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Reply("no JSON"), "unparsable"),
        (Reply('{"instructions": ["cut', finish_reason="length"), "truncated"),
        (Reply("I'm sorry, but I can't help with that."), "refusal"),
    ],
)
def test_an_answer_that_stays_unusable_is_counted_by_its_reason_and_not_asked_again(tmp_path, reply, reason):
    def fault(body: dict[str, Any], before: int) -> Reply | None:
        return reply if "sub_topics" in str(schema_of(body)) else None

    with serving_model(fault) as endpoint:
        ending = run(settings_of(tmp_path, endpoint))
        assert ending.report["stages"]["sub_topics"]["missed"] == {reason: 4}
        assert (counts_of(tmp_path), misses_of(tmp_path)) == (Counter(meta_topics=2), Counter({reason: 4}))
        num_asked = len(endpoint.asked)
        run(settings_of(tmp_path, endpoint))
        assert len(endpoint.asked) == num_asked == 2 + 2 * 4
        endpoint.fault = lambda body, before: None
        run(settings_of(tmp_path, endpoint, retry_rejected=True))
    assert counts_of(tmp_path)["responses"] == PLANNED["responses"]


@pytest.mark.parametrize(
    ("text", "finish_reason", "reason"),
    [
        ("As an AI language model, I cannot do this.", "stop", "refusal"),
        ("It goes on and on", "length", "truncated"),
        ("", "stop", "too_short"),
        ("Das ist eine Antwort in einer Sprache, nach der hier niemand gefragt hat.", "stop", "language"),
    ],
)
def test_a_response_that_is_no_good_is_rejected(tmp_path, text, finish_reason, reason):
    def fault(body: dict[str, Any], before: int) -> Reply | None:
        is_hit = schema_of(body) is None and body["seed"] % 4 == 0
        return Reply(text, finish_reason=finish_reason) if is_hit else None

    with serving_model(fault) as endpoint:
        run(settings_of(tmp_path, endpoint, turns=1, turn_share=1.0))
    missed = misses_of(tmp_path)
    assert set(missed) == {reason}
    counts = counts_of(tmp_path)
    num_asked = sum(schema_of(body) is None for body in endpoint.asked)
    assert missed[reason] == num_asked - counts["responses"] - counts["responses_1"]
    assert counts["user_turns_1"] == counts["responses"] < PLANNED["responses"]


def test_responses_are_held_to_their_own_lengths_and_not_to_those_of_instructions(tmp_path):
    """Responses longer than the longest instruction were rejected."""
    limits = {"instruction": 100, "response": 1000}
    path = write_domain(tmp_path / "brief.yaml", name="brief", limits=limits)
    with serving_model() as endpoint:
        ending = run(settings_of(tmp_path / "out", endpoint, domain=(str(path),)))
    assert ending.report["stages"]["responses"] == {"calls": 24, "items": 24, "rejected": {}, "missed": {}}
    lengths = [len(item.text) for record in records_of(tmp_path / "out").values() for item in record.items]
    assert max(lengths) > 100


def test_instructions_that_are_no_good_or_say_what_another_says_get_no_response(tmp_path):
    def fault(body: dict[str, Any], before: int) -> Reply | None:
        if "strong" not in str(schema_of(body)):
            return None
        return Reply(json.dumps({"strong": ["Why?"], "weak": ["Tell me why the sea is salt."]}))

    with serving_model(fault) as endpoint:
        ending = run(settings_of(tmp_path, endpoint, complex_share=0.0))
    assert ending.report["stages"]["related"]["rejected"] == {"too_short": 16}
    assert ending.report["dropped_instructions"] == {"duplicate": 15}
    assert counts_of(tmp_path)["responses"] == 16 + 1


def test_a_list_that_stays_too_short_keeps_the_places_of_the_others(tmp_path):
    def short(body: dict[str, Any], before: int) -> Reply | None:
        schema = schema_of(body)
        return Reply('{"topics": ["Rivers"]}') if schema and "topics" in schema["properties"] else None

    with serving_model(short) as endpoint:
        ending = run(settings_of(tmp_path, endpoint))
    assert ending.report["stages"]["meta_topics"] == {"calls": 2, "items": 2, "rejected": {"missing": 2}, "missed": {}}
    (topics,) = [record for record in records_of(tmp_path).values() if record.stage == "meta_topics"][:1]
    assert [item.id for item in topics.items] == [identify(topics.id, place) for place in range(2)]


# Servers that take other forms, or fail


@pytest.mark.parametrize("refused", [("json_schema",), ("json_schema", "json_object")])
def test_a_server_without_json_schemas_is_asked_in_the_next_looser_form(tmp_path, refused):
    def fault(body: dict[str, Any], before: int) -> Reply | None:
        kind = body.get("response_format", {}).get("type")
        if kind in refused:
            return Reply(f"response_format.type: {kind} is not supported", status=400)
        prompt = body["messages"][-1]["content"]
        for name in ("topics", "instructions", "instruction"):
            if f'{{"{name}": ' in prompt:
                values = {"topics": ["Rivers", "Hills"], "instructions": ["Name a river.", "Name a long hill."]}
                return Reply(json.dumps({name: values.get(name, "Name two rivers and a hill.")}))
        return Reply(json.dumps({"sub_topics": [{"name": "A", "note": ""}, {"name": "B", "note": ""}]}))

    with serving_model(fault) as endpoint:
        run(settings_of(tmp_path, endpoint, strong=0, weak=0, complex_share=0.0, concurrency=1))
    kinds = [body.get("response_format", {}).get("type") for body in endpoint.asked]
    assert kinds[: len(refused)] == list(refused)
    assert set(kinds[len(refused) :]).isdisjoint(refused)
    assert counts_of(tmp_path)["instructions"] == 8


def test_calls_that_fail_are_made_by_the_next_run(tmp_path):
    def fault(body: dict[str, Any], before: int) -> Reply | None:
        return Reply(status=500) if schema_of(body) is None and body["seed"] % 4 == 0 else None

    with serving_model() as endpoint:
        run(settings_of(tmp_path / "whole", endpoint))
    with serving_model(fault) as endpoint:
        ending = run(settings_of(tmp_path / "failed", endpoint))
        assert ending.num_failed == misses_of(tmp_path / "failed")["failed"] > 0
        endpoint.fault = lambda body, before: None
        assert run(settings_of(tmp_path / "failed", endpoint)).num_failed == 0
    assert contents_of(tmp_path / "failed") == contents_of(tmp_path / "whole")


def test_an_instruction_whose_rewriting_failed_waits_for_the_next_run(tmp_path):
    def fault(body: dict[str, Any], before: int) -> Reply | None:
        schema = schema_of(body)
        return Reply(status=503) if schema and "instruction" in schema["properties"] else None

    with serving_model() as endpoint:
        run(settings_of(tmp_path / "whole", endpoint))
    with serving_model(fault) as endpoint:
        ending = run(settings_of(tmp_path / "failed", endpoint))
        assert counts_of(tmp_path / "failed")["responses"] == PLANNED["responses"] - ending.num_failed
        endpoint.fault = lambda body, before: None
        run(settings_of(tmp_path / "failed", endpoint))
    assert contents_of(tmp_path / "failed") == contents_of(tmp_path / "whole")


def test_a_server_that_refuses_every_call_ends_the_run(tmp_path):
    def fault(body: dict[str, Any], before: int) -> Reply | None:
        return Reply("temperature: too hot", status=400) if schema_of(body) is None else None

    refusal = pytest.raises(EndpointError, match=r"refuses every call \(HTTP 400: temperature: too hot\)")
    with serving_model(fault) as endpoint, refusal:
        run(settings_of(tmp_path, endpoint))
    assert MOST_REFUSED <= sum(schema_of(body) is None for body in endpoint.asked) < PLANNED["responses"]


def test_what_the_last_run_was_refused_does_not_end_the_next_one(tmp_path):
    def fault(body: dict[str, Any], before: int) -> Reply | None:
        return Reply("a content policy", status=400) if schema_of(body) is None and body["seed"] % 5 < 3 else None

    with serving_model(fault) as endpoint:
        first = run(settings_of(tmp_path, endpoint, concurrency=1))
        assert first.num_failed > MOST_REFUSED
        assert run(settings_of(tmp_path, endpoint, concurrency=1)).num_failed == first.num_failed


def test_what_was_rejected_is_asked_for_with_another_seed(tmp_path):
    seeds: set[int] = set()

    def fault(body: dict[str, Any], before: int) -> Reply | None:
        return Reply("I'm sorry, but I can't help with that.") if body["seed"] in seeds else None

    def note(body: dict[str, Any], before: int) -> Reply | None:
        if schema_of(body) is None:
            seeds.add(body["seed"])
        return fault(body, before)

    with serving_model(note) as endpoint:
        run(settings_of(tmp_path, endpoint))
        assert counts_of(tmp_path)["responses"] == 0
        endpoint.fault = fault
        run(settings_of(tmp_path, endpoint, retry_rejected=True))
    assert counts_of(tmp_path)["responses"] == PLANNED["responses"]


def test_a_dry_run_is_no_second_writer(tmp_path, capsys):
    with serving_model() as endpoint:
        run(settings_of(tmp_path, endpoint))
    with sole_run(tmp_path):
        command = ["data", "make", str(tmp_path), "--domain", "text", "--model", "m", "--dry-run"]
        assert main(command) == EXIT_WRONG_INPUT
    assert "another" in capsys.readouterr().err


def test_no_server_is_one_line(tmp_path, capsys):
    assert main(["data", "make", str(tmp_path), "--domain", "text", "--model", "m"]) == EXIT_WRONG_INPUT
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ultrafuser")]
    assert "base_url: nothing answers at http://127.0.0.1:8000/v1" in line


# Budget and rates


def test_a_budget_ends_a_run_before_it_is_exceeded_and_a_larger_one_goes_on(tmp_path):
    prices = {"prompt_price": 1.0, "completion_price": 2.0, "list_tokens": 400, "response_tokens": 400}
    with serving_model() as endpoint:
        whole = run(settings_of(tmp_path / "whole", endpoint, **prices))
        cost = whole.report["cost"]
        ending = run(settings_of(tmp_path / "stopped", endpoint, budget=cost / 2, **prices))
        assert ending.is_stopped
        assert 0.3 * cost < ending.report["cost"] <= cost / 2
        again = run(settings_of(tmp_path / "stopped", endpoint, budget=cost / 2, **prices))
        assert (again.is_stopped, again.report["cost"]) == (True, ending.report["cost"])
        ending = run(settings_of(tmp_path / "stopped", endpoint, budget=2 * cost, **prices))
    assert (ending.is_stopped, ending.report["cost"]) == (False, pytest.approx(cost))
    assert contents_of(tmp_path / "stopped") == contents_of(tmp_path / "whole")


def test_a_rate_is_kept(tmp_path):
    with serving_model() as endpoint:
        start = time.monotonic()
        run(settings_of(tmp_path, endpoint, domain=("text",), requests_per_minute=60 * 20))
        seconds = time.monotonic() - start
    assert (len(endpoint.asked) - 1) / seconds < 20


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        ([], "the following arguments are required"),
        (["out", "--domain", "laws"], "laws: no such domain"),
        (["out", "--domain", "text", "text"], "domain: two have the same name"),
        (["out", "--domain", "text", "--budget", "3"], "--budget: without prices"),
        (["out", "--domain", "text", "--complex-share", "2"], "--complex-share: "),
        (["out", "--domain", "text", "--base-url", "here"], "--base-url: 'here' is no address"),
    ],
)
def test_mistakes_are_one_line_and_exit_status_2(tmp_path, monkeypatch, argv, complaint, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["data", "make", *argv]) == EXIT_WRONG_INPUT
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("ultrafuser: ")
    assert complaint in line


def test_the_key_is_sent_and_written_nowhere(tmp_path):
    with serving_model() as endpoint:
        run(settings_of(tmp_path, endpoint, api_key="very-secret"))
    assert {headers["Authorization"] for headers in endpoint.headers} == {"Bearer very-secret"}
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in files if b"very-secret" in path.read_bytes()] == []
    assert json.loads((tmp_path / "report.json").read_text())["settings"]["response_temperature"] == 0.7


def test_two_runs_do_not_share_a_folder(tmp_path):
    in_use = pytest.raises(CommandError, match="another run writes to")
    with serving_model() as endpoint, sole_run(tmp_path), in_use:
        run(settings_of(tmp_path, endpoint))
