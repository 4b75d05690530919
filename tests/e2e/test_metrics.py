"""What a real server counts, blames and traces: every token once, values that are not finite, a client's trace."""

import json
import re
import threading
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.collector import Collector
from tests.e2e.conftest import MODEL, POISON
from tests.e2e.process import ServerProcess, wait_for

SPECIALISTS = ("text", "code", "math")
NONFINITE = 'fused_nonfinite_total{source="code"}'
CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Count with me."}], "temperature": 0}


def scrape(server: ServerProcess) -> dict[str, float]:
    """Every sample by its name and labels."""
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    pairs = [line.rpartition(" ") for line in lines if not line.startswith("#")]
    return {re.sub(r'(engine|model_name)="[^"]*",?', "", name): float(value) for name, _, value in pairs}


def generated(samples: dict[str, float]) -> float:
    return samples["vllm:generation_tokens_total{}"]


def test_a_scrape_after_k_tokens_shows_k(server: ServerProcess, client: openai.OpenAI) -> None:
    wait_for(lambda: server.metric("vllm:num_requests_running{") == 0, "no request is running")
    before = scrape(server)
    chat: Any = client.chat.completions.create
    whole = chat(**CHAT, max_tokens=20, n=1, extra_body={"ignore_eos": True})
    chat(**CHAT | {"temperature": 1}, max_tokens=7, n=3)
    chat(**CHAT, max_tokens=20, stop=[whole.choices[0].message.content[4:6]])
    for _ in chat(**CHAT, max_tokens=9, stream=True):
        pass
    wait_for(lambda: server.metric("vllm:num_requests_running{") == 0, "no request is running")
    after = scrape(server)
    grown = {name: value - before.get(name, 0) for name, value in after.items()}
    num_tokens = generated(after) - generated(before)
    assert num_tokens > 30
    counts = [grown[f'fused_gate_weight_ratio_count{{specialist="{name}"}}'] for name in SPECIALISTS]
    assert counts == [num_tokens] * 3
    sums = [grown[f'fused_gate_weight_ratio_sum{{specialist="{name}"}}'] for name in SPECIALISTS]
    assert sum(sums) == pytest.approx(num_tokens, rel=1e-5)
    assert grown["fused_gate_entropy_ratio_count"] == num_tokens
    assert sum(grown[f'fused_gate_top_specialist_total{{specialist="{name}"}}'] for name in SPECIALISTS) == num_tokens
    assert sum(grown[f'fused_specialist_agreement_total{{agreeing="{n}"}}'] for n in (1, 2, 3)) == num_tokens
    assert 0 < grown["fused_tokens_overridden_total"] <= num_tokens
    for name in SPECIALISTS:
        assert grown[f'fused_specialist_forward_seconds_count{{phase="decode",specialist="{name}"}}'] > 0
    assert grown['fused_overhead_seconds_count{part="gate"}'] == grown['fused_overhead_seconds_count{part="mix"}'] > 0
    assert after["fused_last_step_timestamp_seconds"] > before["fused_last_step_timestamp_seconds"] > 1.7e9


def test_the_state_and_the_gate_of_the_server_are_shown(server: ServerProcess) -> None:
    samples = scrape(server)
    assert (samples["fused_engine_up"], samples["fused_draining"], samples["fused_ready"]) == (1, 0, 1)
    assert any(re.search(r'fused_build_info{gate_sha256="[0-9a-f]{64}"', name) for name in samples)
    assert samples['fused_nonfinite_total{source="gate"}'] == 0


def test_nan_ends_the_request_alone_and_says_so(server: ServerProcess, client: openai.OpenAI) -> None:
    alone = client.chat.completions.create(**CHAT, max_tokens=60, extra_body={"ignore_eos": True})
    before = server.metric(NONFINITE)
    beside: list[Any] = []

    def ask() -> None:
        beside.append(client.chat.completions.create(**CHAT, max_tokens=60, extra_body={"ignore_eos": True}))

    neighbour = threading.Thread(target=ask)
    neighbour.start()
    body = {"model": MODEL, "prompt": [5, 6, POISON, 7], "max_tokens": 5}
    response = httpx.post(f"{server.url}/v1/completions", json=body)
    neighbour.join()
    assert response.status_code == 500
    assert response.headers["x-should-retry"] == "false"
    error = response.json()["error"]
    assert (error["code"], error["type"], error["param"]) == ("nonfinite_output", "server_error", None)
    assert beside[0].choices[0].message.content == alone.choices[0].message.content
    assert server.metric(NONFINITE) == before + 1
    assert server.metric('vllm:request_success_total{engine="0",finished_reason="error"') >= 1


@pytest.mark.parametrize("extra", [{}, {"gate_weights": True}, {"n": 2, "temperature": 0.5}])
def test_nan_in_a_stream_is_its_last_event(server: ServerProcess, extra: dict[str, Any]) -> None:
    before = server.metric(NONFINITE)
    # The only way to this token: a bias that no logit can outweigh.
    body = CHAT | {"max_tokens": 5, "logit_bias": {str(POISON): 100}, "stream": True} | extra
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=60) as response:
        assert response.status_code == 200
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["error"]["code"] == "nonfinite_output"
    assert all("error" not in json.loads(event) for event in events[:-2])
    wait_for(lambda: server.metric("vllm:num_requests_running{") == 0, "no request is running")
    assert server.metric(NONFINITE) > before


def test_a_clients_trace_goes_on_in_the_server(server: ServerProcess, collector: Collector) -> None:
    trace, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    headers = {"traceparent": f"00-{trace}-{parent}-01", "tracestate": "vendor=value"}
    httpx.post(f"{server.url}/v1/chat/completions", json=CHAT | {"max_tokens": 3}, headers=headers, timeout=60)
    (span,) = wait_for(
        lambda: [span for span in list(collector.spans) if span.trace_id.hex() == trace], "the span has arrived"
    )
    assert span.parent_span_id.hex() == parent
    assert span.trace_state == "vendor=value"
    attributes = {item.key: item.value for item in span.attributes}
    assert attributes["gen_ai.usage.completion_tokens"].int_value == 3
