"""A server that always runs ahead, over the wire: the answers of one that does where it pays, several tokens an event
with all that is told of each, marks of drafted tokens, and what became of the drafts."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.asking import ask, events
from tests.e2e.browser import Page
from tests.e2e.conftest import MODEL, NO_SPACES
from tests.e2e.playground import TOKENS, export, load, received, text_of
from tests.e2e.playground import ask as page_asks
from tests.e2e.process import ServerProcess, wait_for

MESSAGES = [{"role": "user", "content": "Tell me about the sea."}]
CHAT: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "max_tokens": 40, "ignore_eos": True}
TEXT: dict[str, Any] = {"model": MODEL, "prompt": "once upon", "temperature": 0, "max_tokens": 40, "ignore_eos": True}
ROUTES = pytest.mark.parametrize(("path", "body"), [("chat/completions", CHAT), ("completions", TEXT)])
EVERYTHING = {"gate_weights": True, "drafted": True, "return_token_ids": True}
MOST_DRAFTS = 4
TOLERANCE = 1e-4
"""Another number of rows in a step is added up in another order."""


@pytest.fixture(scope="module")
def ahead(tiny_fusion: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server of the same model that drafts in every step: in some all drafts hold, in some none."""
    speculation = f'{{"drafter": "leading", "min_tokens": {MOST_DRAFTS}, "max_tokens": {MOST_DRAFTS}}}'
    options = ["--tool-call-parser", "hermes", "--structured-outputs-config", NO_SPACES, "--speculation", speculation]
    server = ServerProcess(tiny_fusion, tmp_path_factory.mktemp("ahead") / "log", *options)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.kill()


def with_logprobs(path: str) -> dict[str, Any]:
    return {"logprobs": True, "top_logprobs": 3} if path.startswith("chat") else {"logprobs": 3}


def choices_in(chunks: list[Any], index: int = 0) -> list[Any]:
    return [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]


def told_of_tokens(choice: Any) -> list[Any]:
    """Of each token: id, whether it was drafted, weights, log probability, alternatives; all are there, or none is."""
    ids = choice.get("token_ids") or []
    drafted = choice.get("drafted", {"content": []})["content"]
    weights = choice.get("gate_weights", {"content": []})["content"]
    logprobs = choice.get("logprobs") or {"content": []}
    if "content" in logprobs:
        entries = logprobs["content"] or []
        own = [entry["logprob"] for entry in entries]
        tops = [{top["token"]: top["logprob"] for top in entry["top_logprobs"]} for entry in entries]
    else:
        own, tops = logprobs["token_logprobs"], logprobs["top_logprobs"]
    return list(zip(ids, drafted, weights, own, tops, strict=True))


def all_told(chunks: list[Any], index: int = 0) -> list[Any]:
    return [token for choice in choices_in(chunks, index) for token in told_of_tokens(choice)]


def said(choice: Any) -> str:
    part = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
    return part.get("content") or ""


def check_same(found: list[Any], wanted: list[Any], *, drafted_too: bool = True) -> None:
    """The same tokens, and of each the same is told."""
    assert [token[0] for token in found] == [token[0] for token in wanted]
    if drafted_too:
        assert [token[1] for token in found] == [token[1] for token in wanted]
    for (_, _, weights, logprob, top), (_, _, own_weights, own_logprob, own_top) in zip(found, wanted, strict=True):
        assert weights == pytest.approx(own_weights, abs=TOLERANCE)
        assert logprob == pytest.approx(own_logprob, abs=10 * TOLERANCE)
        assert sorted(top.values()) == pytest.approx(sorted(own_top.values()), abs=10 * TOLERANCE)


@ROUTES
def test_events_of_several_tokens_tell_of_each_what_one_by_one_is_told(
    ahead: ServerProcess, server: ServerProcess, path: str, body: dict[str, Any]
) -> None:
    asked = {**body, **EVERYTHING, **with_logprobs(path)}
    whole, chunks = ask(ahead, asked, path), events(ahead, asked, path)
    (choice,) = whole["choices"]
    (plain,) = ask(server, asked, path)["choices"]
    assert "".join(map(said, choices_in(chunks))) == said(choice) == said(plain)
    check_same(told_of_tokens(choice), told_of_tokens(plain), drafted_too=False)
    check_same(all_told(chunks), told_of_tokens(choice))
    counts = [len(choice.get("token_ids") or []) for choice in choices_in(chunks)]
    assert max(counts) > 1
    assert sum(counts) == 40
    drafted = choice["drafted"]["content"]
    assert 0 < sum(drafted) < 30
    assert not drafted[0], "nothing is there to run ahead from"
    assert choices_in(chunks)[-1]["drafted"]["mean"] == choice["drafted"]["mean"] == sum(drafted) / 40


@ROUTES
def test_marks_of_drafts_come_alone_if_nothing_else_is_asked_for(
    ahead: ServerProcess, path: str, body: dict[str, Any]
) -> None:
    whole, chunks = ask(ahead, {**body, "drafted": True}, path), events(ahead, {**body, "drafted": True}, path)
    marks = [mark for choice in choices_in(chunks) for mark in choice.get("drafted", {"content": []})["content"]]
    assert marks == whole["choices"][0]["drafted"]["content"]
    assert any(marks)
    for part in (whole, *chunks):
        assert "specialists" not in part
        assert not any("gate_weights" in choice or choice.get("token_ids") for choice in part["choices"])
    for wish in ({}, {"drafted": False}, {"drafted": None}):
        assert not any("drafted" in choice for choice in ask(ahead, {**body, **wish}, path)["choices"])


@ROUTES
def test_usage_in_every_event_counts_all_tokens_of_it(ahead: ServerProcess, path: str, body: dict[str, Any]) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(ahead, {**body, "return_token_ids": True, "stream_options": options}, path)
    num_tokens, steps = 0, []
    for chunk in chunks:
        steps.append(sum(len(choice.get("token_ids") or []) for choice in chunk["choices"]))
        num_tokens += steps[-1]
        assert chunk["usage"]["completion_tokens"] == num_tokens
        assert chunk["usage"]["total_tokens"] == num_tokens + chunk["usage"]["prompt_tokens"]
        assert "accepted_prediction_tokens" not in str(chunk["usage"])
    assert num_tokens == 40
    assert max(steps) > 1
    assert "accepted_prediction_tokens" not in str(ask(ahead, body, path)["usage"])


@ROUTES
@pytest.mark.parametrize("interval", [3, 7])
def test_events_wait_for_as_many_tokens_as_asked(
    ahead: ServerProcess, path: str, body: dict[str, Any], interval: int
) -> None:
    asked = {**body, **EVERYTHING, **with_logprobs(path)}
    chunks = events(ahead, {**asked, "stream_interval": interval}, path)
    check_same(all_told(chunks), told_of_tokens(ask(ahead, asked, path)["choices"][0]))
    counts = [count for choice in choices_in(chunks) if (count := len(choice.get("token_ids") or []))]
    _, *others, _ = counts  # the first token is not kept waiting, the last ones are sent as they are
    assert all(count >= interval for count in others)
    assert len(others) > 2
    assert sum(counts) == 40


@ROUTES
def test_each_of_several_responses_has_its_own(
    ahead: ServerProcess, server: ServerProcess, path: str, body: dict[str, Any]
) -> None:
    asked = {**body, **EVERYTHING, **with_logprobs(path), "n": 3, "temperature": 0.5, "seed": 5}
    whole, chunks = ask(ahead, asked, path), events(ahead, asked, path)
    plain = ask(server, asked, path)
    for choice, own in zip(whole["choices"], plain["choices"], strict=True):
        check_same(told_of_tokens(choice), told_of_tokens(own), drafted_too=False)
        check_same(all_told(chunks, choice["index"]), told_of_tokens(choice), drafted_too=False)
        assert any(token[1] for token in all_told(chunks, choice["index"]))
    assert len({str(choice["token_ids"]) for choice in whole["choices"]}) == 3


@ROUTES
def test_a_stop_string_cuts_a_round_and_all_that_is_told_of_it(
    ahead: ServerProcess, path: str, body: dict[str, Any]
) -> None:
    asked = {**body, **EVERYTHING, **with_logprobs(path)}
    (free,) = ask(ahead, asked, path)["choices"]
    drafted = free["drafted"]["content"]
    begin = next(place for place in range(40) if drafted[place : place + 3] == [True] * 3)
    last = tokens_of(free)[begin + 1]  # in the middle of drafts that hold
    end = next(end for end in range(1, 41) if last in "".join(tokens_of(free)[:end]))
    cut = {**asked, "stop": [last], "include_stop_str_in_output": True}
    (choice,) = ask(ahead, cut, path)["choices"]
    assert choice["finish_reason"] == "stop"
    check_same(told_of_tokens(choice), told_of_tokens(free)[:end])
    check_same(all_told(events(ahead, cut, path)), told_of_tokens(choice))


def tokens_of(choice: Any) -> list[str]:
    logprobs = choice["logprobs"]
    return [entry["token"] for entry in logprobs["content"]] if "content" in logprobs else logprobs["tokens"]


def test_an_echoed_prompt_has_no_marks(ahead: ServerProcess) -> None:
    asked = {**TEXT, "echo": True, "logprobs": 1, "drafted": True}
    (choice,) = ask(ahead, asked, "completions")["choices"]
    assert choice["text"].startswith(TEXT["prompt"])
    assert len(choice["logprobs"]["tokens"]) > 40 == len(choice["drafted"]["content"])
    assert any(choice["drafted"]["content"])
    parts = choices_in(events(ahead, asked, "completions"))
    assert "".join(part["text"] for part in parts) == choice["text"]
    marks = [mark for part in parts for mark in part.get("drafted", {"content": []})["content"]]
    assert marks == choice["drafted"]["content"]


SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "string", "maxLength": 30}},
    "required": ["a"],
    "additionalProperties": False,
}
FORMAT = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}
CALL = {
    "tools": [{"type": "function", "function": {"name": "look", "parameters": SCHEMA}}],
    "tool_choice": {"type": "function", "function": {"name": "look"}},
}


@pytest.mark.parametrize("wish", [FORMAT, CALL], ids=["format", "call"])
def test_structured_outputs_and_tool_calls_have_a_mark_for_every_token(
    ahead: ServerProcess, server: ServerProcess, wish: dict[str, Any]
) -> None:
    asked = {**CHAT, **wish, **EVERYTHING, "max_tokens": 80, "ignore_eos": False, "logprobs": True}
    (choice,) = ask(ahead, asked)["choices"]
    (plain,) = ask(server, asked)["choices"]
    check_same(told_of_tokens(choice), told_of_tokens(plain), drafted_too=False)
    chunks = events(ahead, {**asked, "stream_options": {"include_usage": True}})
    marks = [mark for own in choices_in(chunks) for mark in own.get("drafted", {"content": []})["content"]]
    assert marks == choice["drafted"]["content"]
    assert len(marks) == len(choice["token_ids"]) == chunks[-1]["usage"]["completion_tokens"]
    if wish is CALL:
        ((call,), (own,)) = (one["message"]["tool_calls"] for one in (choice, plain))
        assert call["function"] == own["function"]


NAMES = {
    "drafts": 'fused_draft_tokens_total{drafter="leading"}',
    "accepted": 'fused_accepted_tokens_total{drafter="leading"}',
    "last": 'fused_undrafted_requests_total{reason="last_token"}',
    "undrafted": 'fused_drafts_per_round_bucket{le="0.0"}',
    "rounds": "fused_drafts_per_round_count",
    "verified": "fused_drafts_per_round_sum",
    "given": "fused_tokens_per_round_sum",
    "vllm drafts": "vllm:spec_decode_num_draft_tokens_total{",
    "vllm accepted": "vllm:spec_decode_num_accepted_tokens_total{",
    "vllm rounds": "vllm:spec_decode_num_drafts_total{",
}


def scrape(server: ServerProcess) -> dict[str, float]:
    wait_for(lambda: server.metric("vllm:num_requests_running{") == 0, "no request is running")
    return {name: server.metric(line) for name, line in NAMES.items()}


def test_a_scrape_shows_what_became_of_drafts(ahead: ServerProcess) -> None:
    before = scrape(ahead)
    choices = ask(ahead, {**CHAT, "n": 2, "temperature": 0.5, "seed": 1, "drafted": True})["choices"]
    choices += ask(ahead, {**TEXT, "drafted": True}, "completions")["choices"]
    grown = {name: value - before[name] for name, value in scrape(ahead).items()}
    accepted = sum(sum(choice["drafted"]["content"]) for choice in choices)
    assert grown["accepted"] == grown["vllm accepted"] == accepted > 0
    assert grown["drafts"] == grown["verified"] == grown["vllm drafts"]
    assert grown["given"] == 3 * 39
    assert grown["rounds"] == grown["given"] - accepted == grown["vllm rounds"] + grown["undrafted"]
    assert grown["undrafted"] == grown["last"]


def test_a_given_text_is_read_alike_and_counts_as_no_draft(ahead: ServerProcess, server: ServerProcess) -> None:
    body = {"messages": MESSAGES, "answer": "The sea is wide, and its answer is 42."}
    before = scrape(ahead)
    found, wanted = (httpx.post(f"{own.url}/v1/gate/analyze", json=body, timeout=60).json() for own in (ahead, server))
    grown = {name: value - before[name] for name, value in scrape(ahead).items()}
    assert len(found["tokens"]) == len(wanted["tokens"]) > 20
    for token, own in zip(found["tokens"], wanted["tokens"], strict=True):
        assert token["token"] == own["token"]
        assert token["logprob"] == pytest.approx(own["logprob"], abs=10 * TOLERANCE)
        assert token["gate_weights"] == pytest.approx(own["gate_weights"], abs=TOLERANCE)
    assert grown["vllm accepted"] > 10
    assert {grown[name] for name in NAMES if not name.startswith("vllm")} == {0}


def test_the_playground_marks_what_was_guessed_ahead(ahead: ServerProcess, browser: Page) -> None:
    browser.resize(1280, 860)
    load(browser, ahead.url)
    page_asks(browser, MESSAGES[0]["content"], temperature=0, max_completion_tokens=40)
    choices = [choice for event in received(browser) for choice in event["choices"]]
    drafted = [mark for choice in choices for mark in choice.get("drafted", {"content": []})["content"]]
    assert 0 < sum(drafted) < len(drafted)
    shown = browser.evaluate(f"[...{TOKENS}].map(token => token.classList.contains('drafted'))")
    assert shown == drafted
    line = f"[...{TOKENS}].map(token => getComputedStyle(token).boxShadow !== 'none')"
    assert browser.evaluate(line) == drafted
    share = f"{100 * sum(drafted) / len(drafted):.0f} %"
    assert text_of(browser, "#drafted-share") == share
    facts = text_of(browser, ".facts")
    assert re.search(rf"^{len(drafted)} tokens.* · [0-9.]+ tokens/s · {share} drafted$", facts), facts
    assert re.fullmatch(r"[0-9.]+ tokens/s", text_of(browser, "#speed"))
    for is_drafted in (True, False):
        place = drafted.index(is_drafted)
        browser.point_at(f"{TOKENS}[{place}]")
        browser.wait_until(f"{TOKENS}[{place}].getAttribute('aria-describedby') === 'card'")
        assert ("guessed ahead" in text_of(browser, "#card")) == is_drafted
    (turn,) = export(browser)["turns"]
    assert [token["drafted"] for token in turn["tokens"]] == drafted
    assert turn["drafted_share"] == sum(drafted) / len(drafted)
    assert turn["tokens_per_second"] > 0
    browser.click("document.querySelector('#new')")
    assert browser.evaluate("document.querySelector('#drafted').hidden")
    assert text_of(browser, "#speed") == "\u2013"
    assert browser.problems == []
