"""The wire: OpenAI's objects and errors on every path, ids, probes and metrics."""

import json
from typing import Any

import httpx
import pytest
from vllm.exceptions import GenerationError, QueueOverflowError, VLLMValidationError
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from tests.server.scripted import SCRIPT, ScriptedEngine
from ultrafuser.server.engine.client.nonfinite import NonfiniteOutputError
from ultrafuser.server.errors import MAX_MESSAGE_CHARS
from ultrafuser.server.health import Readiness

# vLLM's own request model marks OpenAI's older spelling as deprecated and then reads it itself.
pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated:DeprecationWarning")

HI: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
URL = "/v1/chat/completions"


def events(response: httpx.Response) -> list[str]:
    """The data of a stream's events."""
    return [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]


def check_error(response: httpx.Response, status: int, param: str | None, code: str | None) -> dict[str, Any]:
    """The response is OpenAI's error object and nothing else."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert set(response.json()) == {"error"}
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["code"]) == (param, code)
    assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")
    assert error["message"]
    assert "Traceback" not in error["message"]
    return error


async def test_a_conversation_is_answered(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    response = await client.post(URL, json=HI)
    body = response.json()
    assert response.status_code == 200
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"]["content"] == SCRIPT
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["prompt_tokens"] == len(engine.prompts[0]["prompt_token_ids"])
    assert len(engine.prompts[0]["specialist_prompts"]) == 3


async def test_a_stream_has_one_id_and_ends_with_done(client: httpx.AsyncClient) -> None:
    response = await client.post(URL, json={**HI, "stream": True, "stream_options": {"include_usage": True}})
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, last = events(response)
    assert last == "[DONE]"
    parsed = [json.loads(chunk) for chunk in chunks]
    assert {chunk["object"] for chunk in parsed} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in parsed}) == 1
    deltas = [choice["delta"].get("content", "") for chunk in parsed for choice in chunk["choices"]]
    assert "".join(deltas) == SCRIPT
    assert parsed[-1]["usage"]["completion_tokens"] > 1


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/index.html", 404, "not_found"),
        ("GET", "/v1/nothing", 404, "not_found"),
        ("POST", "/v1/completions/", 404, "not_found"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("POST", "/v1/models", 405, "method_not_allowed"),
        ("POST", "/metrics", 405, "method_not_allowed"),
        ("GET", "/docs", 404, "not_found"),
        ("POST", "/v1/embeddings", 404, "not_found"),
        ("POST", "/v1/responses/compact", 405, "method_not_allowed"),
        ("POST", "/v1/load_lora_adapter", 404, "not_found"),
    ],
)
async def test_an_unknown_route_is_an_error_object(
    client: httpx.AsyncClient, method: str, path: str, status: int, code: str
) -> None:
    error = check_error(await client.request(method, path, json={}), status, None, code)
    assert error["message"].startswith(f"{method} {path}: ")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [{"role": "wizard", "content": "Hi"}]}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        (HI | {"temperature": "hot"}, "temperature"),
        (HI | {"temperature": -1}, "temperature"),
        (HI | {"top_p": 2}, "top_p"),
        (HI | {"n": 0}, "n"),
        (HI | {"max_tokens": 0}, "max_tokens"),
        (HI | {"stop": ["a"] * 5000}, "stop"),
        (HI | {"stop": ""}, "stop"),
        (HI | {"logit_bias": {"x": 1}}, "logit_bias"),
        (HI | {"top_logprobs": 3}, "top_logprobs"),
        (HI | {"stream_options": {"include_usage": True}}, "stream_options"),
        (HI | {"response_format": {"type": "json_schema"}}, "response_format"),
        (HI | {"tools": []}, "tools"),
        (HI | {"tool_choice": "required"}, "tool_choice"),
    ],
    ids=str,
)
async def test_a_wrong_field_is_named(client: httpx.AsyncClient, body: dict[str, Any], param: str) -> None:
    check_error(await client.post(URL, json=body), 400, param, None)


async def test_an_unknown_model_is_not_found(client: httpx.AsyncClient) -> None:
    for url, body in ((URL, HI), ("/v1/completions", {"prompt": "Hi"}), ("/tokenize", {"prompt": "Hi"})):
        check_error(await client.post(url, json=body | {"model": "other"}), 404, "model", "model_not_found")
    check_error(await client.get("/v1/models/other"), 404, "model", "model_not_found")


async def test_an_over_long_prompt_names_the_numbers(client: httpx.AsyncClient) -> None:
    body = {"messages": [{"role": "user", "content": "word " * 1000}]}
    error = check_error(await client.post(URL, json=body), 400, "messages", "context_length_exceeded")
    assert "1024 tokens" in error["message"]
    error = check_error(
        await client.post("/v1/completions", json={"prompt": "word " * 1000}), 400, "prompt", "context_length_exceeded"
    )
    assert "1024 tokens" in error["message"]


async def test_an_error_does_not_send_the_request_back(client: httpx.AsyncClient) -> None:
    huge = "x" * 100_000
    response = await client.post(URL, json={**HI, "model": huge})
    assert len(check_error(response, 404, "model", "model_not_found")["message"]) < MAX_MESSAGE_CHARS + 10


async def test_tools_without_a_parser_are_refused(client: httpx.AsyncClient) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    check_error(await client.post(URL, json={**HI, "tools": [tool]}), 400, None, None)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("failure", "status", "code", "headers"),
    [
        (EngineDeadError(), 500, "engine_dead", {"x-should-retry": "false"}),
        (EngineGenerateError(), 500, "internal_error", {}),
        (GenerationError("/srv/secret broke"), 500, "internal_error", {"x-should-retry": "false"}),
        (NonfiniteOutputError(), 500, "nonfinite_output", {"x-should-retry": "false"}),
        (QueueOverflowError(), 503, "server_overloaded", {"retry-after": "1"}),
        (VLLMValidationError("no such thing", parameter="seed"), 400, None, {}),
        (RuntimeError("/srv/secret broke"), 500, "internal_error", {"x-should-retry": "false"}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
async def test_a_failure_before_the_first_token_is_a_status(
    client: httpx.AsyncClient,
    engine: ScriptedEngine,
    failure: Exception,
    status: int,
    code: str | None,
    headers: dict[str, str],
    stream: bool,
) -> None:
    engine.failure = failure
    response = await client.post(URL, json={**HI, "stream": stream})
    param = "seed" if status == 400 else None
    assert "secret" not in check_error(response, status, param, code)["message"]
    for name, value in headers.items():
        assert response.headers[name] == value


async def test_a_failure_after_the_first_token_is_the_last_event(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    engine.failure, engine.fails_at = EngineDeadError(), 2
    response = await client.post(URL, json={**HI, "stream": True})
    assert response.status_code == 200
    *chunks, error, last = events(response)
    assert last == "[DONE]"
    assert json.loads(error)["error"]["code"] == "engine_dead"
    assert len(chunks) > 1
    assert all("error" not in json.loads(chunk) for chunk in chunks)


async def test_nan_after_the_first_token_is_the_last_event(
    client: httpx.AsyncClient, engine: ScriptedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """vLLM's stream generators turn an error of generation into one of their own, which has no code."""
    engine.failure, engine.fails_at = NonfiniteOutputError(), 2
    for url, body in ((URL, HI), ("/v1/completions", {"model": "tiny", "prompt": "Hi"})):
        *_, error, last = events(await client.post(url, json={**body, "stream": True}))
        assert last == "[DONE]"
        assert json.loads(error)["error"]["code"] == "nonfinite_output"
    assert caplog.text.count("a stream ended early: The model computed a value") == 2
    assert "Traceback" not in caplog.text


async def test_the_state_is_looked_up_when_somebody_scrapes(
    client: httpx.AsyncClient, engine: ScriptedEngine, readiness: Readiness
) -> None:
    async def state() -> list[str]:
        names = ("fused_ready ", "fused_engine_up ", "fused_draining ", "fused_unfinished_requests ")
        lines = (await client.get("/metrics")).text.splitlines()
        return [line.split()[1] for name in names for line in lines if line.startswith(name)]

    assert await state() == ["1.0", "1.0", "0.0", "0.0"]
    engine.num_unfinished = 2
    readiness.is_ending = True
    assert await state() == ["0.0", "1.0", "1.0", "2.0"]
    engine.errored = True
    assert await state() == ["0.0", "0.0", "1.0", "2.0"]


async def test_a_full_queue_is_refused_before_rendering(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.refusal = QueueOverflowError()
    response = await client.post(URL, json=HI)
    check_error(response, 503, None, "server_overloaded")
    assert response.headers["retry-after"] == "1"
    assert engine.prompts == []


async def test_the_models_are_listed_and_found_by_name(client: httpx.AsyncClient) -> None:
    (model,) = (await client.get("/v1/models")).json()["data"]
    assert (model["id"], model["object"], model["owned_by"]) == ("tiny", "model", "ultrafuser")
    assert model["max_model_len"] == 1024
    assert "/" not in model["root"]
    found = (await client.get("/v1/models/tiny")).json()
    assert found["id"] == "tiny"


async def test_tokenize_counts_the_longest_rendering(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    await client.post(URL, json=HI)
    tokens = (await client.post("/tokenize", json=HI)).json()
    assert tokens["tokens"] == engine.prompts[0]["prompt_token_ids"]
    assert tokens["count"] == len(tokens["tokens"])


async def test_detokenize_reverses_tokenize(client: httpx.AsyncClient) -> None:
    tokens = (await client.post("/tokenize", json={"prompt": "Hello there"})).json()["tokens"]
    assert (await client.post("/detokenize", json={"tokens": tokens})).json() == {"prompt": "Hello there"}


async def test_a_plain_request_id_is_kept_and_names_the_response(client: httpx.AsyncClient) -> None:
    response = await client.post(URL, json=HI, headers={"X-Request-Id": "my-id.7"})
    assert response.headers["x-request-id"] == "my-id.7"
    assert response.json()["id"] == "chatcmpl-my-id.7"


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "../../etc", "a;b"])
async def test_any_other_request_id_is_replaced(client: httpx.AsyncClient, given: str) -> None:
    response = await client.post(URL, json=HI, headers={"X-Request-Id": given})
    own = response.headers["x-request-id"]
    assert own != given
    assert response.json()["id"] == f"chatcmpl-{own}"


async def test_errors_carry_a_request_id(client: httpx.AsyncClient) -> None:
    assert (await client.get("/nothing")).headers["x-request-id"]


async def test_health_is_about_the_engine_only(
    client: httpx.AsyncClient, engine: ScriptedEngine, readiness: Readiness
) -> None:
    readiness.is_warm = False
    assert (await client.get("/health")).status_code == 200
    engine.errored = True
    assert (await client.get("/health")).status_code == 503


async def test_ready_needs_a_token_a_living_engine_and_no_end_in_sight(
    client: httpx.AsyncClient, engine: ScriptedEngine, readiness: Readiness
) -> None:
    async def status() -> int:
        gauge = [line for line in (await client.get("/metrics")).text.splitlines() if line.startswith("fused_ready ")]
        response = await client.get("/ready")
        assert float(gauge[0].split()[-1]) == (response.status_code == 200)
        return response.status_code

    readiness.is_warm = False
    assert await status() == 503
    readiness.is_warm = True
    assert await status() == 200
    readiness.is_ending = True
    assert await status() == 503
    readiness.is_ending, engine.errored = False, True
    assert await status() == 503


async def test_version_names_ours_and_vllms(client: httpx.AsyncClient) -> None:
    body = (await client.get("/version")).json()
    assert set(body) == {"version", "vllm_version"}


async def test_metrics_are_in_prometheus_text_format(client: httpx.AsyncClient) -> None:
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    assert "# TYPE fused_ready gauge" in response.text


async def test_browsers_of_other_origins_get_nothing(client: httpx.AsyncClient) -> None:
    response = await client.get("/v1/models", headers={"Origin": "http://evil.example"})
    assert "access-control-allow-origin" not in response.headers


async def test_the_schema_describes_the_routes(client: httpx.AsyncClient) -> None:
    paths = (await client.get("/openapi.json")).json()["paths"]
    assert set(paths) == {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/responses/{response_id}",
        "/v1/responses/{response_id}/input_items",
        "/v1/responses/{response_id}/cancel",
        "/v1/gate/analyze",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/models",
        "/v1/models/{name}",
        "/tokenize",
        "/detokenize",
        "/version",
        "/health",
        "/ready",
        "/metrics",
    }
