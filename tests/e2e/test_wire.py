"""What passes over the wire of a real server: events, probes, metrics, clients that leave."""

import json
import socket
import subprocess
import time
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from tests.e2e.conftest import MODEL
from tests.e2e.process import ServerProcess, wait_for

LONG: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Go on for ever."}],
    "max_tokens": 800,
    "ignore_eos": True,
}
RUNNING = "vllm:num_requests_running{"
GENERATED = "vllm:generation_tokens_total{"
LEFT = "fused_client_disconnects_total"
PATIENCE_SECONDS = 120.0


def test_curl_sees_events_as_they_come_and_done_at_the_end(server: ServerProcess) -> None:
    # On a loaded machine the reader may sleep until everything is there; then it has seen nothing of the order.
    wait_for(lambda: count_arrivals(server) > 5, "events arrive one after the other", PATIENCE_SECONDS)


def count_arrivals(server: ServerProcess) -> int:
    """At how many moments (rounded to 10 ms) curl has seen the events of one stream; checks what they say."""
    body = json.dumps(LONG | {"max_tokens": 80, "stream": True})
    command = ["curl", "-sN", f"{server.url}/v1/chat/completions", "-H", "Content-Type: application/json", "-d", body]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as curl:
        assert curl.stdout is not None
        arrivals = [(time.monotonic(), line.rstrip("\n")) for line in curl.stdout if line.strip()]
    lines = [line for _, line in arrivals]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    return len({round(moment, 2) for moment, _ in arrivals})


def test_arguments_and_tokens_in_events_are_whole_for_clients_that_split_at_unicodes_line_ends(
    server: ServerProcess,
) -> None:
    said = "red\u2028\u2029\x85 sea"
    call = f'<tool_call>\n{{"name": "paint", "arguments": {{"colour": "{said}"}}}}\n</tool_call>'
    tool = {"type": "function", "function": {"name": "paint", "parameters": {"type": "object"}}}
    wish = {"structured_outputs": {"choice": [call]}, "tools": [tool], "logprobs": True, "top_logprobs": 1}
    body = LONG | wish | {"stream": True, "ignore_eos": False}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=60) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    choices = [choice for line in lines[:-1] for choice in json.loads(line)["choices"]]
    calls = [call["function"] for choice in choices for call in choice["delta"].get("tool_calls") or []]
    assert json.loads("".join(call.get("arguments") or "" for call in calls)) == {"colour": said}
    entries = [entry for choice in choices for entry in (choice.get("logprobs") or {}).get("content") or []]
    assert call in b"".join(bytes(entry["bytes"]) for entry in entries).decode()


def leave_stream(server: ServerProcess) -> None:
    """Read one event of a stream and close the connection."""
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=LONG | {"stream": True}) as response:
        next(response.iter_lines())


def leave_before_response(server: ServerProcess) -> None:
    """Send a request and close the connection while it is running."""
    body = json.dumps(LONG).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    url = httpx.URL(server.url)
    with socket.create_connection((url.host, url.port)) as connection:
        connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        time.sleep(0.2)


@pytest.mark.parametrize("leave", [leave_stream, leave_before_response])
def test_a_client_that_leaves_ends_its_request(server: ServerProcess, leave: Callable[[ServerProcess], None]) -> None:
    def is_noticed_in_time() -> bool:
        left, generated = server.metric(LEFT), server.metric(GENERATED)
        leave(server)
        wait_for(lambda: server.metric(RUNNING) == 0, "no request is running")
        few = server.metric(GENERATED) - generated < LONG["max_tokens"] / 2
        return few and server.metric(LEFT) > left

    # On a loaded machine a client may leave so late that everything is generated.
    wait_for(is_noticed_in_time, "the engine stops early", PATIENCE_SECONDS)


def test_nothing_runs_when_nobody_asks(server: ServerProcess, client: openai.OpenAI) -> None:
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hi"}]
    client.chat.completions.create(model=MODEL, messages=messages, max_tokens=2)
    wait_for(lambda: server.metric(RUNNING) == 0, "no request is running")
    assert server.metric("vllm:num_requests_waiting{") == 0


def test_probes_answer_and_say_that_the_server_can_generate(server: ServerProcess) -> None:
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert httpx.get(f"{server.url}/ready").json() == {"status": "ready"}
    assert server.metric("fused_ready") == 1
    assert server.metric("fused_specialists{") == 3


def test_metrics_hold_vllms_ours_and_the_requests(server: ServerProcess, client: openai.OpenAI) -> None:
    generated = server.metric(GENERATED)
    counted = 'http_requests_total{handler="/v1/chat/completions",method="POST",status="2xx"}'
    before = server.metric(counted)
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hi"}]
    response = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=5)
    assert response.usage is not None
    expected = generated + response.usage.completion_tokens
    wait_for(lambda: server.metric(GENERATED) == expected, "every token is counted")
    assert server.metric(counted) == before + 1
    assert server.metric("fused_build_info{") == 1


def test_the_log_has_ids_and_no_prompts(server: ServerProcess) -> None:
    secret = "correct horse battery staple"
    body = LONG | {"messages": [{"role": "user", "content": secret}], "max_tokens": 2}
    httpx.post(f"{server.url}/v1/chat/completions", json=body, headers={"X-Request-Id": "traced-1"})
    httpx.post(f"{server.url}/v1/chat/completions", json=body | {"temperature": -1, "stream": True})
    (line,) = wait_for(
        lambda: [line for line in server.log.splitlines() if "[traced-1]" in line], "the request is in the log"
    )
    assert "POST '/v1/chat/completions' 200" in line
    assert secret not in server.log
    assert "Traceback" not in server.log, server.log[server.log.index("Traceback") - 2000 :][:6000]


def test_the_start_shows_its_steps_and_nothing_of_vllms(server: ServerProcess) -> None:
    start = server.log[: server.log.index("\nready: ")]
    assert [line[:5] for line in start.splitlines() if line.startswith("[")] == [
        f"[{step}/4]" for step in (1, 1, 2, 2, 3, 3, 4, 4)
    ]
    assert "(EngineCore" not in start
    assert "(Worker" not in start
    assert "WARNING" not in start
    assert "device cpu" in start or "device NVIDIA" in start
    assert "specialist: {'name': 'code'" in start
