"""A fleet under load: conversations arrive whatever happens, each request has an end that counts, p99 is judged."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from shutil import which
from subprocess import run
from typing import Any

import httpx
import pytest

from benchmarks.arrivals import Answer, Clients, Talk
from benchmarks.environment import REPOSITORY
from benchmarks.fleet import FleetOptions, Window, compare, measure

TALK = Talk(num_turns=3, first_words=5, next_words=2, num_tokens=2, think_seconds=0.0)


def events(*pieces: str, reason: str | None = "length", is_done: bool = True) -> str:
    chunks: list[dict[str, Any]] = [{"choices": [{"delta": {"content": piece}}]} for piece in pieces]
    chunks.append({"choices": [{"delta": {}, "finish_reason": reason}]})
    told = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)
    return told + "data: [DONE]\n\n" if is_done else told


def ask(handler: Callable[[httpx.Request], httpx.Response], act: Callable[[Clients], Awaitable[None]]) -> Clients:
    async def run() -> Clients:
        async with httpx.AsyncClient(base_url="http://x", transport=httpx.MockTransport(handler)) as client:
            asking = Clients(client, TALK, seed=0)
            await act(asking)
            return asking

    return asyncio.run(run())


def test_a_conversation_goes_on_with_the_answers_that_it_got() -> None:
    bodies = []

    def answer(request: httpx.Request) -> httpx.Response:
        bodies.append(json.loads(request.content))
        return httpx.Response(200, text=events("a", "b"))

    asking = ask(answer, lambda clients: clients.one_by_one(1))
    assert [len(body["messages"]) for body in bodies] == [1, 3, 5]
    assert bodies[2]["messages"][:2] == [bodies[0]["messages"][0], {"role": "assistant", "content": "ab"}]
    assert all(answer.is_whole and len(answer.arrivals) == 2 for answer in asking.answers)


@pytest.mark.parametrize("status", [429, 503])
def test_who_is_turned_away_leaves(status: int) -> None:
    async def come(clients: Clients) -> None:
        await clients.arrive(per_second=40, seconds=0.2, drain_seconds=1)

    asking = ask(lambda _: httpx.Response(status), come)
    assert 1 <= len(asking.answers) <= 20
    assert all(answer.is_refused and not answer.is_lost for answer in asking.answers)


@pytest.mark.parametrize(
    "response",
    [
        httpx.Response(500),
        httpx.Response(400),
        httpx.Response(200, text=events("a", is_done=False)),
        httpx.Response(200, text=events("a", reason=None)),
        httpx.Response(200, text=events("a", reason="stop")),
    ],
    ids=["500", "400", "cut", "no reason", "another reason"],
)
def test_what_has_no_end_of_its_own_is_lost(response: httpx.Response) -> None:
    def answer(_: httpx.Request) -> httpx.Response:
        return httpx.Response(response.status_code, content=response.content)

    async def come(clients: Clients) -> None:
        await clients.arrive(per_second=40, seconds=0.2, drain_seconds=1)

    asking = ask(answer, come)
    assert asking.answers
    assert all(answer.is_lost for answer in asking.answers)


def test_conversations_come_though_nobody_answers() -> None:
    """An open loop: clients of a closed one would wait, and a server that is late would look well."""

    class Never(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            await asyncio.sleep(60)
            yield b""

    async def come(clients: Clients) -> None:
        await clients.arrive(per_second=100, seconds=1, drain_seconds=0)

    asking = ask(lambda _: httpx.Response(200, stream=Never()), come)
    assert 60 <= len(asking.answers) <= 140
    assert all(answer.left is not None and not answer.is_lost for answer in asking.answers)


def window(load: float, answers: Sequence[Answer]) -> Window:
    shares = {"hit_share": 0.5, "servers_share": 0.4, "balancer_share": 0.1, "sender_share": 0.1}
    return Window(load=load, begin=10, end=20, answers=answers, **shares)


def whole(sent: float, first: float, count: int = 3, gap: float = 0.1) -> Answer:
    arrivals = [sent + first + gap * index for index in range(count)]
    return Answer(sent=sent, status=200, arrivals=arrivals, ended=arrivals[-1])


def test_goodput_is_of_whole_answers_that_begin_in_time_and_end_while_it_counts() -> None:
    answers = [
        whole(sent=11, first=1),
        whole(sent=9, first=1.5),  # begun before
        whole(sent=12, first=3),  # too late
        whole(sent=19, first=1.5),  # ends behind the window
        Answer(sent=13, status=503),
        Answer(sent=13, status=200, arrivals=[13.5]),  # half an answer
    ]
    assert window(1, answers).goodput(patience=2) == pytest.approx(2 / 10)


def test_who_still_waits_counts_with_the_time_that_it_has_waited() -> None:
    answers = [whole(sent=11, first=1), Answer(sent=12, status=200, left=25), Answer(sent=13, status=503)]
    seen = window(2, answers)
    assert seen.first_seconds == [1, 13]
    assert seen.refused_share == pytest.approx(1 / 3)
    assert "33% refused, 0 lost" in seen.note


def test_overload_is_judged_by_the_best_goodput_and_by_saturations_first_tokens() -> None:
    calm = window(0.5, [whole(sent=11, first=0.1)])
    saturated = window(1.0, [whole(sent=11 + index / 10, first=0.5) for index in range(10)])
    over = window(2.0, [whole(sent=11 + index / 10, first=1.1) for index in range(9)])
    found = {item.case: item for item in compare("4 engines", [calm, saturated, over], patience=2)}
    assert found["4 engines, load 2: goodput"].ratio == pytest.approx(0.9)
    assert found["4 engines, load 2: goodput"].is_met
    assert found["4 engines, load 2: first token"].ratio == pytest.approx(2.2)
    assert found["4 engines, load 2: first token"].is_met is False
    assert found["4 engines, load 2: gap"].is_met is None
    assert found["4 engines, load 0.5: goodput"].is_met is None
    impatient = {item.case: item for item in compare("4 engines", [saturated, over], patience=1)}
    assert impatient["4 engines, load 2: goodput"].ratio == 0


def test_a_forked_server_says_why_it_has_ended() -> None:
    code = "import os; from benchmarks.sleeping import _fork; print(os.waitpid(_fork(lambda: 1 // 0), 0)[1] >> 8)"
    done = run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"
    assert "ZeroDivisionError" in done.stderr


def test_engines_that_sleep_are_served_over_real_http_behind_the_balancer() -> None:
    if which("haproxy", path="/usr/sbin:/usr/bin:/usr/local/bin") is None:
        pytest.skip("needs HAProxy; on Debian 12: apt-get install haproxy")
    found = {item.case: item for item in measure(FleetOptions(quick=True))}
    goodput, first = found["2 engines, load 3: goodput"], found["2 engines, load 3: first token"]
    assert goodput.ratio is not None
    assert goodput.ratio > 0
    assert goodput.note is not None
    assert " 0 lost" in goodput.note
    assert " 0% refused" not in goodput.note  # by the server's own default
    assert " 0% of prompts cached" not in goodput.note
    assert first.fused is not None
    assert first.fused.p50 is not None
    assert first.fused.p50 >= 30  # a step
    gap = found["2 engines, load 1: gap"]
    assert gap.fused is not None
    assert gap.fused.p50 is not None
    assert gap.fused.p50 >= 30
    cost = found["2 engines: a token of a long stream"]
    assert cost.fused is not None
    assert 10 < cost.fused.value < 10_000
