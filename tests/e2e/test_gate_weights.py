"""The gate's weights over the wire: as many rows as tokens, the reference's numbers, whatever else is asked for."""

import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch

from tests.e2e.asking import ask, events
from tests.e2e.conftest import MODEL
from tests.e2e.process import ServerProcess
from tests.prompts import prompts_of
from ultrafuser.gating.model.fusion import load_fusion
from ultrafuser.gating.model.reference import UltraFuserForCausalLM

NAMES = ["text", "code", "math"]
QUESTION = "Tell me about the sea."
CHAT: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": QUESTION}],
    "temperature": 0,
    "max_tokens": 12,
    "gate_weights": True,
}
SUM_TOLERANCE = 5e-6
"""Each weight is rounded to six digits."""
BATCH_TOLERANCE = 1e-5
"""Requests that share their steps with others are added up in another order."""


def rows_in(chunks: list[Any], index: int = 0) -> list[list[float]]:
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return [row for choice in choices for row in choice.get("gate_weights", {}).get("content", [])]


def nearly(weights: list[Any]) -> Any:
    """The same numbers in a batch of another size."""
    return pytest.approx(np.array(weights), abs=BATCH_TOLERANCE)


def check(weights: Any, num_tokens: int) -> None:
    """As many rows as tokens, each a distribution, and their mean."""
    rows = weights["content"]
    assert len(rows) == num_tokens
    assert all(sum(row) == pytest.approx(1, abs=SUM_TOLERANCE) and min(row) >= 0 for row in rows)
    assert weights["mean"] == pytest.approx([sum(own) / len(own) for own in zip(*rows, strict=True)], abs=1e-6)


def test_the_weights_are_the_references(server: ServerProcess, tiny_fusion: Path) -> None:
    fusion = load_fusion(tiny_fusion)
    (wanted,) = UltraFuserForCausalLM.from_fusion(fusion).respond(
        [prompts_of(fusion, QUESTION)], max_new_tokens=12, eos_token_ids=fusion.eos_token_ids
    )
    response = ask(server, {**CHAT, "return_token_ids": True})
    (choice,) = response["choices"]
    assert response["specialists"] == NAMES
    assert choice["token_ids"] == wanted.token_ids
    check(choice["gate_weights"], len(wanted.token_ids))
    for found, own in zip(choice["gate_weights"]["content"], wanted.gate_weights.tolist(), strict=True):
        assert found == pytest.approx(own, abs=1e-4)


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_a_stream_has_the_weights_of_each_parts_tokens(server: ServerProcess, path: str) -> None:
    body = CHAT if path.startswith("chat") else {**CHAT, "prompt": "once upon"} | {"messages": None}
    body = {name: value for name, value in body.items() if value is not None}
    whole = ask(server, body, path)
    chunks = events(server, body, path)
    assert [chunk.get("specialists") for chunk in chunks] == [NAMES] + [None] * (len(chunks) - 1)
    assert rows_in(chunks) == nearly(whole["choices"][0]["gate_weights"]["content"])
    last = [choice for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
    assert last[0]["gate_weights"]["mean"] == nearly(whole["choices"][0]["gate_weights"]["mean"])
    assert not any("token_ids" in choice for chunk in chunks for choice in chunk["choices"]), "nobody asked for them"
    assert not any("prompt_token_ids" in chunk for chunk in chunks)


def test_parts_line_up_with_token_ids_and_logprobs(server: ServerProcess) -> None:
    chunks = events(server, {**CHAT, "return_token_ids": True, "logprobs": True, "top_logprobs": 0})
    num_tokens = 0
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        own = len(choice.get("token_ids") or [])
        assert len(choice.get("gate_weights", {}).get("content", [])) == own
        assert len((choice["logprobs"] or {"content": []})["content"]) == own
        num_tokens += own
    assert num_tokens == 12


def test_several_choices_have_weights_of_their_own(server: ServerProcess) -> None:
    body = {**CHAT, "n": 3, "temperature": 1.0, "seed": 5, "return_token_ids": True}
    whole = ask(server, body)
    for choice in whole["choices"]:
        check(choice["gate_weights"], len(choice["token_ids"]))
    assert len({json.dumps(choice["gate_weights"]["content"]) for choice in whole["choices"]}) == 3
    chunks = events(server, body)
    for choice in whole["choices"]:
        assert rows_in(chunks, choice["index"]) == nearly(choice["gate_weights"]["content"])


def test_several_prompts_have_weights_of_their_own(server: ServerProcess) -> None:
    body = {**CHAT, "prompt": ["one two", "a sea of words"], "n": 2, "temperature": 1.0, "seed": 5}
    del body["messages"]
    whole = ask(server, body, "completions")
    chunks = events(server, body, "completions")
    assert len(whole["choices"]) == 4
    for choice in whole["choices"]:
        assert rows_in(chunks, choice["index"]) == nearly(choice["gate_weights"]["content"])


def test_a_stop_string_ends_text_and_weights_together(server: ServerProcess) -> None:
    free = ask(server, {**CHAT, "return_token_ids": True})["choices"][0]
    text = free["message"]["content"]
    body = {**CHAT, "stop": text[len(text) // 2 : len(text) // 2 + 2], "return_token_ids": True}
    for stream in (False, True):
        if stream:
            chunks = events(server, body)
            ids = [token for chunk in chunks for choice in chunk["choices"] for token in choice.get("token_ids") or []]
            rows = rows_in(chunks)
        else:
            (choice,) = ask(server, body)["choices"]
            assert choice["finish_reason"] == "stop"
            ids, rows = choice["token_ids"], choice["gate_weights"]["content"]
        assert 0 < len(ids) < len(free["token_ids"])
        assert rows == nearly(free["gate_weights"]["content"][: len(ids)])


@pytest.mark.parametrize("stream", [False, True])
def test_structured_output_and_tool_calls_have_weights_for_every_token(server: ServerProcess, stream: bool) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    tool = {"type": "function", "function": {"name": "look", "parameters": schema}}
    wishes: list[dict[str, Any]] = [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}},
        {"tools": [tool], "tool_choice": {"type": "function", "function": {"name": "look"}}},
    ]
    for wish in wishes:
        body = {**CHAT, **wish, "max_tokens": 60, "return_token_ids": True}
        if stream:
            chunks = events(server, {**body, "stream_options": {"include_usage": True}})
            assert len(rows_in(chunks)) == chunks[-1]["usage"]["completion_tokens"]
        else:
            (choice,) = ask(server, body)["choices"]
            check(choice["gate_weights"], len(choice["token_ids"]))


def test_the_official_client_reads_them(client: openai.OpenAI) -> None:
    response = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=4,
        temperature=0,
        extra_body={"gate_weights": True},
    )
    assert response.model_extra is not None
    assert response.model_extra["specialists"] == NAMES
    extra = response.choices[0].model_extra
    assert extra is not None
    check(extra["gate_weights"], 4)


@pytest.mark.parametrize("wish", [{}, {"gate_weights": False}, {"gate_weights": None}])
def test_nobody_gets_them_unasked(server: ServerProcess, wish: dict[str, Any]) -> None:
    body = {name: value for name, value in CHAT.items() if name != "gate_weights"} | wish
    for text in (json.dumps(ask(server, body)), json.dumps(events(server, body))):
        assert "gate_weights" not in text
        assert "specialists" not in text


@pytest.mark.parametrize("wish", ["true", 1, [True]])
def test_another_value_is_refused_by_name(server: ServerProcess, wish: Any) -> None:
    response = httpx.post(f"{server.url}/v1/chat/completions", json={**CHAT, "gate_weights": wish})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "gate_weights"


def analyze(server: ServerProcess, **body: Any) -> Any:
    return httpx.post(f"{server.url}/v1/gate/analyze", json=body, timeout=120)


def read_by_the_reference(
    tiny_fusion: Path, prompts: list[list[int]], given: list[int]
) -> tuple[list[float], list[list[float]]]:
    """Log probability and weights of each given token, from one forward pass."""
    model = UltraFuserForCausalLM.from_fusion(load_fusion(tiny_fusion))
    rows = [torch.tensor([[*prompt, *given]]) for prompt in prompts]
    masks = [torch.arange(row.shape[1])[None] >= len(prompt) for row, prompt in zip(rows, prompts, strict=True)]
    with torch.no_grad():
        output = model(input_ids=rows, attention_mask=[torch.ones_like(row) for row in rows], response_mask=masks)
    logprobs = output.logits[0].log_softmax(dim=-1)[range(len(given)), given].tolist()
    return logprobs, output.gate_weights[:, 0].T.tolist()


def check_tokens(tokens: list[Any], logprobs: list[float], weights: list[list[float]]) -> None:
    for token, logprob, own in zip(tokens, logprobs, weights, strict=True):
        assert token["logprob"] == pytest.approx(logprob, abs=5e-4)
        assert token["gate_weights"] == pytest.approx(own, abs=1e-4)


def test_an_answer_is_analyzed_as_the_reference_reads_it(server: ServerProcess, tiny_fusion: Path) -> None:
    answer = "The sea is wide, and its answer is 42."
    result = analyze(server, messages=[{"role": "user", "content": QUESTION}], answer=answer).json()
    assert (result["object"], result["model"], result["specialists"]) == ("gate.analysis", MODEL, NAMES)
    assert "".join(token["token"] for token in result["tokens"]) == answer
    given = [token["token_id"] for token in result["tokens"]]
    prompts = prompts_of(load_fusion(tiny_fusion), QUESTION)
    assert len({len(prompt) for prompt in prompts}) > 1
    check_tokens(result["tokens"], *read_by_the_reference(tiny_fusion, prompts, given))
    rows = [token["gate_weights"] for token in result["tokens"]]
    assert result["mean"] == pytest.approx([sum(own) / len(own) for own in zip(*rows, strict=True)], abs=1e-5)


def test_a_text_is_analyzed_from_its_second_token_on(server: ServerProcess, tiny_fusion: Path) -> None:
    text = "def add(a, b): return a + b"
    first, *rest = analyze(server, text=text).json()["tokens"]
    assert first["token"] + "".join(token["token"] for token in rest) == text
    assert (first["logprob"], first["gate_weights"]) == (None, None)
    given = [token["token_id"] for token in rest]
    check_tokens(rest, *read_by_the_reference(tiny_fusion, [[first["token_id"]]] * 3, given))


CUT = "ok \U0001f600\U0001f99c \xe9\u6f22"
"""Every letter that is not ASCII is several tokens."""


def test_parts_of_characters_have_bytes_and_no_text_of_their_own(server: ServerProcess) -> None:
    """They were decoded one by one, to replacement characters."""
    conversation = [{"role": "user", "content": QUESTION}]
    for body in ({"text": CUT}, {"messages": conversation, "answer": CUT}):
        tokens = analyze(server, **body).json()["tokens"]
        assert len(tokens) == len(CUT.encode()) > len(CUT)
        assert "".join(token["token"] for token in tokens) == CUT
        assert b"".join(bytes(token["bytes"]) for token in tokens) == CUT.encode()
        assert all(len(token["bytes"]) == 1 for token in tokens)


@pytest.mark.parametrize("stream", [False, True])
def test_cut_characters_are_whole_in_log_probabilities_too(server: ServerProcess, stream: bool) -> None:
    """In a response's own and in those of an echoed prompt."""
    wish = {"structured_outputs": {"choice": [CUT]}, "max_tokens": 40, "logprobs": True, "return_token_ids": True}
    parts = events(server, {**CHAT, **wish}) if stream else [ask(server, {**CHAT, **wish})]
    choices = [choice for part in parts for choice in part["choices"]]
    entries = [entry for choice in choices for entry in (choice["logprobs"] or {}).get("content") or []]
    ids = [token_id for choice in choices for token_id in choice.get("token_ids") or []]
    assert len(entries) == len(ids) > len(CUT.encode())  # and the end
    assert "".join(entry["token"] for entry in entries[: len(CUT.encode())]) == CUT
    assert b"".join(bytes(entry["bytes"]) for entry in entries[: len(CUT.encode())]) == CUT.encode()
    echo = {"model": MODEL, "prompt": CUT, "echo": True, "logprobs": 1, "max_tokens": 0}
    parts = events(server, echo, "completions") if stream else [ask(server, echo, "completions")]
    tokens = [token for part in parts for choice in part["choices"] for token in choice["logprobs"]["tokens"]]
    assert "".join(tokens) == CUT


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "text"),
        ({"text": "x y", "messages": [], "answer": "z"}, "text"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "answer"),
        ({"text": "x y", "answer": "z"}, "answer"),
        ({"text": ""}, "text"),
        ({"text": "e"}, "text"),
        ({"text": "x y", "temperature": 1}, "temperature"),
        ({"text": "no room " * 2000}, "text"),
        ({"messages": [{"role": "user", "content": "hi"}], "answer": "no room " * 800}, "answer"),
    ],
)
def test_what_cannot_be_analyzed_is_refused_by_name(server: ServerProcess, body: dict[str, Any], param: str) -> None:
    response = analyze(server, **body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


def test_another_model_is_not_found(server: ServerProcess) -> None:
    assert analyze(server, text="a b", model="other").status_code == 404


def test_users_cannot_force_tokens_in_other_requests(server: ServerProcess) -> None:
    body = {**CHAT, "vllm_xargs": {"forced_token_ids": [5, 6]}}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "vllm_xargs"
