"""The shipped balancer before replicas that answer what they are told: who is asked, how often, what clients see."""

import json
import random
import re
import signal
import socket
import ssl
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.balancer import FOLDER, Balancer, free_port
from tests.deploy.replicas import NUM_EVENTS, Names, Replica, Replicas
from tests.e2e.process import wait_for
from ultrafuser.server.settings import ServerSettings

NUM_TURNS = 4
NUM_CONVERSATIONS = 16
BUFFER_BYTES = int(re.findall(r"tune.bufsize (\d+)", (FOLDER / "haproxy.cfg").read_text())[0])
LONGER_THAN_THE_BUFFER = 8 * 2**20 - 4096  # and nearly the longest body that a server takes

Form = Callable[[int, int], Any]
"""The body of a conversation's turn: the conversation's number and the turn's."""


@pytest.fixture(scope="module")
def replicas() -> Iterator[Replicas]:
    """Three, which each test finds as they were at first."""
    with Replicas(3, free_port("0.0.0.0")) as replicas:
        yield replicas


@pytest.fixture(scope="module")
def shared_balancer(replicas: Replicas, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Balancer]:
    """Before all of them."""
    with Balancer(tmp_path_factory.mktemp("balancer") / "log", replicas.port) as balancer:
        yield balancer


@pytest.fixture
def balancer(shared_balancer: Balancer, replicas: Replicas) -> Balancer:
    """It, once it sends requests to all three."""
    replicas.reset()
    wait_for(lambda: len(shared_balancer.ready()) == 3, "all replicas are ready")
    return shared_balancer


def ask(balancer: Balancer, body: Any, path: str = "/v1/chat/completions", **headers: str) -> httpx.Response:
    """An answer; `headers` have underscores for hyphens."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    given = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    return balancer.client.post(f"{balancer.url}{path}", content=content, headers=given)


def replica_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return response.headers["x-replica"]


# Where a conversation stays


def turns(conversation: int, turn: int, content: Callable[[str, bool], Any] = lambda text, is_last: text) -> list[Any]:
    """A conversation's messages up to the user's turn of this number."""
    messages: list[Any] = []
    for number in range(turn + 1):
        text = f'Überlege, question {number} of conversation {conversation}: ["{{\\'
        messages.append({"role": "user", "content": content(text, number == turn)})
        messages.append({"role": "assistant", "content": f"answer {number}"})
    return messages[:-1]


def marked_parts(text: str, is_last: bool) -> list[Any]:
    """As Anthropic's clients send it: what may be cached ends with the last turn, whichever that is."""
    mark = {"cache_control": {"type": "ephemeral"}} if is_last else {}
    return [{"type": "text", "text": "<reminder/>"}, {"type": "text", "text": text, **mark}]


def billed(conversation: int, turn: int) -> Any:
    """Claude Code's first block of `system` differs from request to request."""
    billing = {"type": "text", "text": f"x-anthropic-billing-header: cch={conversation}{turn};"}
    rules = {"type": "text", "text": "Be brief."}
    return {"max_tokens": 9, "system": [billing, rules], "messages": turns(conversation, turn, marked_parts)}


def items(conversation: int, turn: int) -> Any:
    """A first turn may be sent as a text."""
    messages = turns(conversation, turn, lambda text, _: [{"type": "input_text", "text": text}])
    return {"instructions": "Be brief.", "input": turns(conversation, 0)[0]["content"] if turn == 0 else messages}


FORMS: dict[str, Form] = {
    "messages": lambda c, t: {"model": "tiny", "messages": turns(c, t)},
    "system message": lambda c, t: {"messages": [{"content": "Be brief.", "role": "system"}, *turns(c, t)]},
    "developer message": lambda c, t: {"messages": [{"role": "developer", "content": "Brief!"}, *turns(c, t)]},
    "parts": lambda c, t: {"messages": turns(c, t, marked_parts), "max_tokens": 8 + t},
    "system blocks": billed,
    "input": items,
    "prompt": lambda c, t: {"prompt": f"Conversation {c}. " + "Few words. " * 30 + "And so on. " * t},
    "token ids": lambda c, t: {"prompt": [c, *range(1000, 1100), *range(t)]},
    "indented": lambda c, t: json.dumps({"messages": turns(c, t)}, indent=2, ensure_ascii=False).encode(),
    "long first turn": lambda c, t: {"messages": turns(c, t, lambda text, _: text + " word" * BUFFER_BYTES)},
    "long and early": lambda c, t: {"messages": turns(c, t), "metadata": "x" * LONGER_THAN_THE_BUFFER},
    "long and late": lambda c, t: {"tools": [f"{c} {'x' * LONGER_THAN_THE_BUFFER}"], "messages": turns(c, t)},
}


@pytest.mark.parametrize("form", FORMS)
def test_all_turns_of_a_conversation_go_to_one_replica_and_conversations_to_all(balancer: Balancer, form: str) -> None:
    count = 6 if "long" in form else NUM_CONVERSATIONS
    visited = [
        {replica_of(ask(balancer, FORMS[form](conversation, turn))) for turn in range(NUM_TURNS)}
        for conversation in range(count)
    ]
    assert [len(each) for each in visited] == [1] * count
    assert len(set.union(*visited)) > 1


def test_a_client_names_its_conversation_by_a_header(balancer: Balancer) -> None:
    body = FORMS["messages"](0, 0)
    sessions = [{replica_of(ask(balancer, body, X_Session_ID=f"session-{n}")) for _ in range(3)} for n in range(16)]
    assert [len(each) for each in sessions] == [1] * 16
    assert set.union(*sessions) == {"replica-1", "replica-2", "replica-3"}
    assert replica_of(ask(balancer, body, X_Session_ID="")) == replica_of(ask(balancer, body))


def test_conversations_that_differ_in_instructions_alone_are_told_apart(balancer: Balancer) -> None:
    for form in ("system", "instructions"):
        field = "messages" if form == "system" else "input"
        bodies = [
            {form: f"You help user {number}.", field: [{"role": "user", "content": "Hi"}]} for number in range(16)
        ]
        assert len({replica_of(ask(balancer, body)) for body in bodies}) == 3


def test_two_balancers_agree_on_every_conversation(balancer: Balancer, replicas: Replicas, tmp_path: Path) -> None:
    with Balancer(tmp_path / "log", replicas.port) as other:
        wait_for(lambda: len(other.ready()) == 3, "all replicas are ready")
        bodies = [FORMS["messages"](conversation, 0) for conversation in range(32)]
        assert [replica_of(ask(other, body)) for body in bodies] == [replica_of(ask(balancer, body)) for body in bodies]


def test_requests_that_begin_no_conversation_go_to_all_in_turn(balancer: Balancer) -> None:
    bodies = [{}, {"messages": []}, {"input": ""}, {"text": "Hi"}, b"[", b"null", b"", b'{"messages', b"\xff\x00"]
    assert set(Counter(replica_of(ask(balancer, body)) for body in bodies).values()) == {len(bodies) // 3}


def test_any_body_is_passed_on_as_it_is(balancer: Balancer, replicas: Replicas) -> None:
    whole = json.dumps(billed(3, 2)).encode()
    bodies = [whole[:length] for length in range(0, len(whole), 7)] + [b"{" * 70000, b'{"messages":' + b"[" * 70000]
    chance = random.Random(0)
    bodies += [b'{"input":' + bytes(chance.choices(b'{}[]":,\\1 ', k=40)) for _ in range(300)]
    for body in bodies:
        assert ask(balancer, body).status_code == 200
        (asked,) = replicas.asked()
        assert asked["length"] == str(len(body))


# Another replica is tried


def refusing(replica: Replica, status: int) -> None:
    """As a server refuses early, before it has read a body."""
    replica.status, replica.headers = 425, {"X-Refused": str(status), "Retry-After": "7"}


@pytest.mark.parametrize("status", [429, 503])
def test_what_one_replica_turns_away_at_once_another_one_takes(
    balancer: Balancer, replicas: Replicas, status: int
) -> None:
    body = FORMS["messages"](1, 0)
    home = replicas.named(replica_of(ask(balancer, body)))
    replicas.asked()
    refusing(home, status)
    assert replica_of(ask(balancer, body)) != home.name
    assert sorted(Counter(each["replica"] for each in replicas.asked()).values()) == [1, 1]
    home.status, home.headers = 200, {}
    assert replica_of(ask(balancer, body)) == home.name


@pytest.mark.parametrize("status", [429, 503])
def test_what_all_turn_away_is_told_as_the_replicas_meant_it(
    balancer: Balancer, replicas: Replicas, status: int
) -> None:
    for replica in replicas.each:
        refusing(replica, status)
    response = ask(balancer, FORMS["messages"](1, 0))
    assert (response.status_code, response.headers["retry-after"]) == (status, "7")
    assert "x-refused" not in response.headers
    asked = replicas.asked()
    assert (len(asked), len({each["replica"] for each in asked})) == (5, 3)
    assert len({each["x-request-id"] for each in asked}) == 1
    response = ask(balancer, FORMS["long and early"](1, 0))  # cannot be sent again
    assert response.status_code == status


@pytest.mark.parametrize("body", [FORMS["messages"](0, 0), {}], ids=["conversation", "none"])
def test_one_replica_with_room_is_found_among_full_ones(balancer: Balancer, replicas: Replicas, body: Any) -> None:
    """The third that was asked was the first one again, by the same hash."""
    for free in replicas.each:
        for full in set(replicas.each) - {free}:
            refusing(full, 503)
        free.seconds = 2
        with ThreadPoolExecutor(1) as pool:
            pool.submit(httpx.post, f"{balancer.url}/v1/x", json={}, timeout=30)
            wait_for(lambda: free.num_running == 1, "it has something to do", 10)  # noqa: B023
            free.seconds = 0
            assert {replica_of(ask(balancer, body)) for _ in range(6)} == {free.name}
        replicas.reset()


@pytest.mark.parametrize("status", [400, 429, 500, 503, 504])
def test_no_other_answer_is_asked_for_again(balancer: Balancer, replicas: Replicas, status: int) -> None:
    for replica in replicas.each:
        replica.status = status
    assert ask(balancer, FORMS["messages"](1, 0)).status_code == status
    assert len(replicas.asked()) == 1


def test_a_replica_that_ends_while_it_may_generate_is_one_clear_error(balancer: Balancer, replicas: Replicas) -> None:
    for replica in replicas.each:
        replica.breaks_off = True
    for _ in range(3):  # on one connection
        response = ask(balancer, FORMS["messages"](1, 0))
        assert (response.status_code, response.json()["error"]["code"]) == (502, "replica_lost")
        assert len(replicas.asked()) == 1


def test_a_replica_that_is_gone_is_left_at_once_and_returned_to(balancer: Balancer, replicas: Replicas) -> None:
    bodies = [FORMS["messages"](conversation, 0) for conversation in range(12)]
    bodies += [FORMS["long and early"](conversation, 0) for conversation in range(6)]
    before = [replica_of(ask(balancer, body)) for body in bodies]
    replicas.each[1].close()
    for body, home in zip(bodies, before, strict=True):
        now = replica_of(ask(balancer, body))
        assert now == home or home == "replica-2" != now
    wait_for(lambda: "replica-2" not in balancer.ready(), "it is out", 10)
    replicas.each[1].listen()
    wait_for(lambda: "replica-2" in balancer.ready(), "it is back", 10)
    assert [replica_of(ask(balancer, body)) for body in bodies] == before


def test_without_a_replica_clients_are_told_so_at_once(tmp_path: Path) -> None:
    with Balancer(tmp_path / "log", free_port("0.0.0.0")) as balancer:
        wait_for(lambda: balancer.metrics(), "the balancer listens")
        wait_for(lambda: not balancer.is_ready(), "it is not ready", 20)
        response = ask(balancer, FORMS["messages"](0, 0))
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert response.json() == {  # OpenAI's error object, and Anthropic's
        "type": "error",
        "error": {
            "message": "No replica can be reached; try again later.",
            "type": "overloaded_error",
            "param": None,
            "code": "no_replica",
        },
    }


def test_a_replica_that_is_not_ready_gets_no_new_request_and_finishes_its_own(
    balancer: Balancer, replicas: Replicas
) -> None:
    body = FORMS["messages"](2, 0)
    home = replicas.named(replica_of(ask(balancer, body)))
    home.seconds = 0.15
    with balancer.client.stream(
        "POST", f"{balancer.url}/v1/chat/completions", json=body | {"stream": True}
    ) as response:
        lines = response.iter_lines()
        next(lines)
        home.is_ready = False
        wait_for(lambda: home.name not in balancer.ready(), "the balancer sees it", 4)
        assert replica_of(ask(balancer, body)) != home.name
        assert len([line for line in lines if line]) == NUM_EVENTS - 1


def test_a_probe_that_is_answered_late_drives_nobody_away(balancer: Balancer, replicas: Replicas) -> None:
    for replica in replicas.each:
        replica.probe_seconds = 2.5
    failed = balancer.metric("haproxy_server_check_failures_total")
    replicas.await_probes(1)
    assert balancer.metric("haproxy_server_check_failures_total") == failed
    assert len(balancer.ready()) == 3


# What passes, and how


def test_every_event_arrives_before_the_next_is_sent(balancer: Balancer, replicas: Replicas) -> None:
    for replica in replicas.each:
        replica.seconds = 0.05
    sent, arrived = [], []
    body = FORMS["messages"](0, 0) | {"stream": True}
    with balancer.client.stream("POST", f"{balancer.url}/v1/chat/completions", json=body) as response:
        for line in filter(None, response.iter_lines()):
            arrived.append(time.monotonic())
            sent.append(float(line.split()[-1]))
    in_time = [here < following for here, following in zip(arrived, sent[1:], strict=False)]
    assert len(in_time) == NUM_EVENTS - 1
    assert sum(in_time) >= 0.8 * len(in_time)  # a busy machine may be late now and then; what is held back is half


def test_a_client_that_leaves_a_stream_is_gone_for_the_replica(balancer: Balancer, replicas: Replicas) -> None:
    for replica in replicas.each:
        replica.seconds = 0.1
    body = FORMS["messages"](0, 0) | {"stream": True}
    with balancer.client.stream("POST", f"{balancer.url}/v1/chat/completions", json=body) as response:
        next(response.iter_lines())
    left = time.monotonic()
    wait_for(lambda: any(replica.left_at for replica in replicas.each), "the replica has noticed", 10)
    assert max(at for replica in replicas.each for at in replica.left_at) - left < 2


@pytest.mark.parametrize("path", ["/metrics", "/health", "/ready", "/%6detrics", "/metric%73", "/health?x=1"])
def test_probes_and_metrics_of_replicas_are_not_public(balancer: Balancer, replicas: Replicas, path: str) -> None:
    response = balancer.client.get(f"{balancer.url}{path}")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")
    absolute = b"GET http://a%s HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n" % path.encode()
    assert balancer.raw(absolute).startswith(b"HTTP/1.1 404 ")
    assert replicas.asked() == []


def test_replicas_are_told_who_asks_and_nothing_that_a_client_made_up(balancer: Balancer, replicas: Replicas) -> None:
    made_up = {"X_Forwarded_For": "10.9.8.7", "X_Forwarded_Proto": "https", "X_Other_Replicas": "no"}
    ask(balancer, {}, **made_up)
    (asked,) = replicas.asked()
    assert asked["x-forwarded-for"] == "127.0.0.1"
    assert asked["x-forwarded-proto"] == "http"
    assert asked["x-other-replicas"] == "true"
    wait_for(lambda: asked["x-request-id"] in balancer.log, "it is logged")
    ask(balancer, {}, X_Request_Id="my-own", Authorization="Bearer key")
    (asked,) = replicas.asked()
    assert (asked["x-request-id"], asked["authorization"]) == ("my-own", "Bearer key")
    assert asked["connection"] == "close"  # so that no request is lost on a connection that is about to be closed


def test_a_balancer_with_a_certificate_speaks_tls(replicas: Replicas, tmp_path: Path) -> None:
    replicas.reset()
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "2"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*make, *names, "-keyout", "key", "-out", "chain"], cwd=tmp_path, check=True, capture_output=True)
    (tmp_path / "server.pem").write_text((tmp_path / "chain").read_text() + (tmp_path / "key").read_text())
    port = free_port()
    bind = f"127.0.0.1:{port} ssl crt {tmp_path / 'server.pem'} alpn h2,http/1.1"
    with Balancer(tmp_path / "log", replicas.port, BALANCER_BIND=bind) as balancer:
        wait_for(balancer.ready, "it is ready")
        trust = ssl.create_default_context(cafile=str(tmp_path / "chain"))
        response = httpx.post(f"https://127.0.0.1:{port}/v1/chat/completions", json={}, verify=trust)
    assert response.status_code == 200
    assert replicas.asked()[-1]["x-forwarded-proto"] == "https"


def test_a_replica_is_found_by_its_name_and_followed_to_another_address(replicas: Replicas, tmp_path: Path) -> None:
    """As in Compose and Kubernetes, where a server that was started anew has another address."""
    replicas.reset()
    with Names({"server-1.inside": ["127.0.0.1"]}) as names:
        shipped = (FOLDER / "haproxy.cfg").read_text()
        assert "  parse-resolv-conf\n" in shipped
        config = tmp_path / "haproxy.cfg"
        config.write_text(shipped.replace("parse-resolv-conf", f"nameserver names 127.0.0.1:{names.port}"))
        variables = {"REPLICA_NAME": "server-", "REPLICA_DOMAIN": ".inside"}
        with Balancer(tmp_path / "log", replicas.port, config, **variables) as balancer:
            wait_for(lambda: balancer.ready() == {"replica-1"}, "the one name that there is has been found")
            ask(balancer, FORMS["messages"](0, 0))
            names.addresses["server-1.inside"] = ["127.0.0.2"]
            names.addresses["server-2.inside"] = ["127.0.0.3"]
            wait_for(lambda: balancer.ready() == {"replica-1", "replica-2"}, "the second one, too")
            replicas.each[0].close()
            wait_for(lambda: replica_of(ask(balancer, FORMS["messages"](0, 0))) == "replica-1", "it is followed", 20)
    assert {each["replica"] for each in replicas.asked()} >= {"replica-1", "replica-2"}


# The balancer itself


def test_a_balancer_that_ends_lets_streams_finish(replicas: Replicas, tmp_path: Path) -> None:
    replicas.reset()
    for replica in replicas.each:
        replica.seconds = 0.05
    with Balancer(tmp_path / "log", replicas.port) as balancer:
        wait_for(balancer.ready, "it is ready")
        body = FORMS["messages"](0, 0) | {"stream": True}
        with balancer.client.stream("POST", f"{balancer.url}/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            balancer.process.send_signal(signal.SIGUSR1)
            assert len([line for line in lines if line]) == NUM_EVENTS - 1
        balancer.client.close()
        assert balancer.process.wait(20) == 0


def test_a_request_that_is_being_sent_when_the_balancer_ends_is_told_to_come_again(
    replicas: Replicas, tmp_path: Path
) -> None:
    replicas.reset()
    with Balancer(tmp_path / "log", replicas.port) as balancer:
        wait_for(balancer.ready, "it is ready")
        balancer.client.close()
        with socket.create_connection(("127.0.0.1", balancer.port), timeout=10) as connection:
            connection.sendall(b"POST /v1/x HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{")
            time.sleep(0.5)  # until the head is read
            balancer.process.send_signal(signal.SIGUSR1)
            wait_for(lambda: "Stopping frontend" in balancer.log or "stopped" in balancer.log, "it ends")
            connection.sendall(b"}")
            answer = connection.recv(65536).lower()
    assert answer.startswith(b"http/1.1 503 ")
    assert b"retry-after: 1" in answer
    assert replicas.asked() == []


def test_clients_do_not_wait_for_connections_that_other_clients_hold(replicas: Replicas, tmp_path: Path) -> None:
    """A request takes up to three of all connections: past a share of them clients hung, and the probe was silent."""
    replicas.reset()
    shipped = (FOLDER / "haproxy.cfg").read_text()
    most, of_clients = map(int, re.findall(r"^  maxconn (\d+)$", shipped, re.MULTILINE))
    config = tmp_path / "haproxy.cfg"
    num_clients = of_clients // 100
    scaled = shipped.replace(f"maxconn {most}", f"maxconn {most // 100}")
    config.write_text(scaled.replace(f"maxconn {of_clients}", f"maxconn {num_clients}"))
    for replica in replicas.each:
        replica.seconds = 2
    with Balancer(tmp_path / "log", replicas.port, config) as balancer, ThreadPoolExecutor(num_clients) as pool:
        wait_for(lambda: len(balancer.ready()) == 3, "all replicas are ready")
        sent = [pool.submit(ask, balancer, FORMS["messages"](number, 0)) for number in range(num_clients)]
        wait_for(lambda: sum(replica.num_running for replica in replicas.each) == num_clients, "all are running", 2)
        assert balancer.is_ready()
        assert {answer.result().status_code for answer in sent} == {200}


def test_what_compose_asks_the_balancer_is_whether_it_has_a_replica(balancer: Balancer, replicas: Replicas) -> None:
    compose = yaml.safe_load((FOLDER.parent / "compose.yml").read_text())
    _, *command = compose["services"]["balancer"]["healthcheck"]["test"]
    command[-1] = command[-1].replace("/8404", f"/{balancer.status_port}")
    assert subprocess.run(command).returncode == 0
    for replica in replicas.each:
        replica.is_ready = False
    wait_for(lambda: not balancer.is_ready(), "it has none", 10)
    assert subprocess.run(command).returncode != 0


def test_no_stream_is_silent_for_longer_than_the_balancer_waits() -> None:
    config = (FOLDER / "haproxy.cfg").read_text()
    seconds = {name: int(value) for name, value in re.findall(r"^  timeout ([a-z-]+) (\d+)s$", config, re.MULTILINE)}
    assert seconds["client"] > 2 * ServerSettings().keep_alive_interval
    assert "timeout server 1h" in config
    # A replica that ends is seen before it turns requests away.
    inter, fast = (int(value) for value in re.findall(r"inter (\d+)s fastinter (\d+)ms fall 3", config)[0])
    example = (FOLDER.parent / ".env.example").read_text()
    assert int(re.findall(r"REPLICA_SHUTDOWN_DELAY=(\d+)", example)[0]) > inter + 2 * fast / 1000
