"""A server that answers, and one that fails in every way a server can."""

import time
from email.utils import formatdate
from typing import Any

import pytest

from tests.gating.evaluation.endpoint import MODEL, Endpoint, Reply, Script, serving
from ultrafuser.gating.commands import endpoint as endpoint_module
from ultrafuser.gating.commands.endpoint import MAX_TRIES
from ultrafuser.gating.errors import EndpointError
from ultrafuser.gating.evaluation.benchmarks.generation import ChatClient
from ultrafuser.gating.evaluation.benchmarks.items import Answer, Request


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "FIRST_PAUSE_SECONDS", 0.01)


def client_of(endpoint: Endpoint, **changes: Any) -> ChatClient:
    options: dict[str, Any] = {"api_key": None, "timeout_seconds": 10.0, "concurrency": 4}
    return ChatClient(endpoint.base_url, **(options | changes))


async def ask(script: Script, request: Request | None = None, **changes: Any) -> tuple[Answer, Endpoint]:
    with serving(script) as endpoint:
        async with client_of(endpoint, **changes) as client:
            return await client.answer(request or Request("1", ("Hello?",)), MODEL, 64), endpoint


def fails_first(times: int, reply: Reply) -> Script:
    return lambda question, before: reply if before < times else Reply("fine")


async def test_a_request_is_what_the_wire_format_says():
    answer, endpoint = await ask(lambda *_: Reply("Hi."), api_key="key")
    assert (answer.texts, answer.finish_reasons, answer.error, answer.is_final) == (("Hi.",), ("stop",), None, True)
    assert endpoint.asked == [
        {"model": MODEL, "messages": [{"role": "user", "content": "Hello?"}], "temperature": 0, "max_tokens": 64}
    ]
    assert endpoint.headers[0]["Authorization"] == "Bearer key"


async def test_a_second_turn_is_asked_with_the_first_ones_answer():
    def script(question: str, _: int) -> Reply:
        return Reply(f"to {question}")

    answer, endpoint = await ask(script, Request("1", ("one", "two")))
    assert answer.texts == ("to one", "to two")
    assert endpoint.asked[1]["messages"] == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "to one"},
        {"role": "user", "content": "two"},
    ]


async def test_a_second_turn_that_fails_leaves_the_first_and_the_reason():
    def script(question: str, _: int) -> Reply:
        return Reply("first") if question == "one" else Reply("no", status=400)

    answer, _ = await ask(script, Request("1", ("one", "two")))
    assert (answer.texts, answer.error, answer.is_final) == (("first",), "HTTP 400: no", True)


async def test_candidates_are_those_of_the_first_token_that_is_not_blank():
    blank = {"token": "\n", "logprob": -0.1, "top_logprobs": [{"token": "\n", "logprob": -0.1}]}
    yes = {"token": " Yes", "logprob": -0.2, "top_logprobs": [{"token": " Yes", "logprob": -0.2}]}
    request = Request("1", ("Hello?",), max_tokens=3, wants_logprobs=True)
    answer, endpoint = await ask(lambda *_: Reply("\n Yes", tokens=[blank, yes]), request)
    assert answer.top_logprobs == ((" Yes", -0.2),)
    assert (endpoint.asked[0]["logprobs"], endpoint.asked[0]["top_logprobs"]) == (True, 20)
    assert endpoint.asked[0]["max_tokens"] == 3


async def test_a_server_that_refuses_logprobs_is_asked_without():
    with serving(lambda *_: Reply()) as endpoint:

        def script(*_: object) -> Reply:
            refuses = endpoint.asked[-1].get("logprobs")
            return Reply("top_logprobs is not supported", status=400) if refuses else Reply("Yes")

        endpoint.script = script
        async with client_of(endpoint) as client:
            answer = await client.answer(Request("1", ("Hello?",), wants_logprobs=True), MODEL, 64)
    assert (answer.texts, answer.top_logprobs, answer.error) == (("Yes",), None, None)


@pytest.mark.parametrize(
    "fault",
    [
        Reply(status=500),
        Reply(status=503),
        Reply(status=429),
        Reply(status=408),
        Reply(resets=True),
        Reply(raw=b'{"choices": [{"mess'),
        Reply(raw=b'{"choices": []}'),
        Reply(raw=b'{"choices": [{"message": null}]}'),
        Reply(raw=b'{"choices": [{"message": {"content": [1]}}]}'),
        Reply(raw=b"<html>"),
    ],
)
async def test_what_may_pass_is_tried_again(fault):
    answer, endpoint = await ask(fails_first(2, fault))
    assert (answer.texts, answer.error) == (("fine",), None)
    assert len(endpoint.asked) == 3


@pytest.mark.parametrize("form", ["seconds", "date"])
async def test_the_servers_own_pause_is_kept(form):
    # Dates have whole seconds: between two and three from now.
    value = "0.6" if form == "seconds" else formatdate(time.time() + 3, usegmt=True)
    _, endpoint = await ask(fails_first(1, Reply(status=429, headers={"Retry-After": value})))
    assert 0.55 < endpoint.times[1] - endpoint.times[0] < 30


async def test_a_pause_longer_than_the_time_out_is_cut():
    start = time.monotonic()
    answer, _ = await ask(fails_first(1, Reply(status=503, headers={"Retry-After": "3600"})), timeout_seconds=1.0)
    assert answer.texts == ("fine",)
    assert time.monotonic() - start < 30


async def test_pauses_grow(monkeypatch):
    monkeypatch.setattr(endpoint_module, "FIRST_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr("random.uniform", lambda low, high: high)
    _, endpoint = await ask(fails_first(3, Reply(status=500)))
    pauses = [later - earlier for earlier, later in zip(endpoint.times, endpoint.times[1:], strict=False)]
    assert pauses[0] >= 0.05
    assert pauses[1] >= 0.1
    assert pauses[2] >= 0.2


async def test_a_fault_that_stays_is_a_failure_that_may_be_asked_again():
    answer, endpoint = await ask(lambda *_: Reply("overloaded", status=503))
    assert (answer.error, answer.is_final) == (f"HTTP 503: overloaded, {MAX_TRIES} times", False)
    assert (answer.texts, len(endpoint.asked)) == ((), MAX_TRIES)


async def test_broken_answers_that_stay_are_a_failure_with_what_was_sent():
    answer, _ = await ask(lambda *_: Reply(raw=b"<html>gateway</html>"))
    assert "not a chat completion: <html>gateway</html>" in str(answer.error)
    assert not answer.is_final


async def test_a_refusal_is_final_and_not_tried_again():
    answer, endpoint = await ask(lambda *_: Reply("prompt too long", status=400))
    assert (answer.error, answer.is_final) == ("HTTP 400: prompt too long", True)
    assert len(endpoint.asked) == 1


async def test_an_answer_that_takes_too_long_is_given_up_and_not_tried_again_in_this_run():
    answer, endpoint = await ask(lambda *_: Reply("late", wait_seconds=2.0), timeout_seconds=0.5)
    assert (answer.error, answer.is_final) == ("no answer within 0.5 s", False)
    assert len(endpoint.asked) == 1


@pytest.mark.parametrize(("status", "names"), [(401, "api_key"), (403, "api_key"), (404, "model")])
async def test_what_no_request_can_get_past_ends_the_run(status, names):
    with pytest.raises(EndpointError, match=rf"^{names}: .*HTTP {status}: wrong\); correct it"):
        await ask(lambda *_: Reply("wrong", status=status))


async def test_a_server_that_is_not_there_ends_the_run():
    with serving(lambda *_: Reply()) as endpoint:
        pass
    async with client_of(endpoint) as client:
        with pytest.raises(EndpointError, match=r"base_url: nothing answers at .* start the server"):
            await client.answer(Request("1", ("Hello?",)), MODEL, 64)


async def test_the_first_model_of_the_server_is_found():
    with serving(lambda *_: Reply()) as endpoint:
        async with client_of(endpoint) as client:
            assert await client.first_model() == MODEL


@pytest.mark.parametrize("address", ["127.0.0.1:8000/v1", "http://", "http://host:port/v1", "ftp://host/v1", ""])
def test_what_is_no_address_is_refused_before_anything_is_asked(address):
    with pytest.raises(EndpointError, match=r"base_url: .* is no address; give one such as"):
        ChatClient(address, api_key=None, timeout_seconds=1.0, concurrency=1)
