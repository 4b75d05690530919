"""What is not fused is refused with a 400 that names the field, before the engine hears of it."""

from typing import Any

import httpx
import pytest

from tests.server.scripted import ScriptedEngine
from ultrafuser.server.requests.unsupported import (
    CHAT_REFUSALS,
    COMPLETION_REFUSALS,
    MAX_NOTICED_FIELDS,
    RESPONSES_REFUSALS,
)

# vLLM's own request model marks OpenAI's older spelling as deprecated and then reads it itself.
pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated:DeprecationWarning")

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
TEXT: dict[str, Any] = {"prompt": "Hi"}
TEMPLATES = {"chat_template", "chat_template_kwargs", "documents", "mm_processor_kwargs", "media_io_kwargs"}


def part(kind: str, **content: Any) -> dict[str, Any]:
    """A conversation whose second content part is not text."""
    parts = [{"type": "text", "text": "Look:"}, {"type": kind, **content}]
    return {"messages": [{"role": "user", "content": parts}]}


def after(**answer: Any) -> dict[str, Any]:
    """A conversation that goes on after this answer."""
    return {"messages": [*CHAT["messages"], {"role": "assistant", "content": None, **answer}, *CHAT["messages"]]}


CUSTOM_CALL = {"id": "a", "type": "custom", "custom": {"name": "f", "input": "x"}}
FUNCTION = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
CUSTOM_TOOL = {"type": "custom", "custom": {"name": "f"}}


EVERYWHERE: list[tuple[str, dict[str, Any]]] = [
    ("use_beam_search", {"use_beam_search": True, "n": 2}),
    ("best_of", {"best_of": 2}),
    ("length_penalty", {"length_penalty": 2.0}),
    ("watermarking", {"watermarking": True}),
    ("thinking_token_budget", {"thinking_token_budget": 5}),
    ("routed_experts_prompt_start", {"routed_experts_prompt_start": 1}),
    ("return_token_offsets", {"return_token_offsets": True}),
    ("return_mm_kwargs", {"return_mm_kwargs": True}),
    ("mm_payload", {"mm_payload": "none"}),
    ("request_id", {"request_id": "mine"}),
    ("guided_json", {"guided_json": {"type": "object"}}),
    ("guided_regex", {"guided_regex": "a"}),
    ("guided_choice", {"guided_choice": ["a"]}),
    ("guided_grammar", {"guided_grammar": "root ::= 'a'"}),
    ("stop_token_ids", {"stop_token_ids": [320]}),
    ("kv_transfer_params", {"kv_transfer_params": {"do_remote_decode": True}}),
    ("ec_transfer_params", {"ec_transfer_params": {"a": 1}}),
    ("vllm_xargs", {"vllm_xargs": {"specialist_prompts": "x"}}),
    ("vllm_xargs", {"vllm_xargs": {"kv_transfer_params": "x"}}),
    ("vllm_xargs", {"vllm_xargs": {"drafted": 1}}),
    ("extra_args", {"extra_args": {"specialist_prompts": [[1]]}}),
    ("specialist_prompts", {"specialist_prompts": [[1], [1], [1]]}),
    ("allowed_token_ids", {"allowed_token_ids": [5, 320]}),
    ("logit_bias", {"logit_bias": {"320": 5}}),
    ("logit_bias", {"logit_bias": {"-1": 5}}),
]
CHAT_ONLY: list[tuple[str, dict[str, Any]]] = [
    ("prompt_logprobs", {"prompt_logprobs": 0}),
    ("prompt_logprobs", {"prompt_logprobs": 5}),
    ("echo", {"echo": True, "logprobs": True}),
    ("chat_template", {"chat_template": "{{ messages }}"}),
    ("chat_template_kwargs", {"chat_template_kwargs": {"chat_template": "{{ messages }}"}}),
    ("chat_template_kwargs", {"chat_template_kwargs": {"tokenize": True}}),
    ("chat_template_kwargs", {"chat_template_kwargs": {"tools": []}}),
    ("documents", {"documents": [{"title": "a", "text": "b"}]}),
    ("mm_processor_kwargs", {"mm_processor_kwargs": {"a": 1}}),
    ("media_io_kwargs", {"media_io_kwargs": {"image": {"a": 1}}}),
    ("truncate_prompt_tokens", {"truncate_prompt_tokens": 5}),
    ("truncation_side", {"truncation_side": "left"}),
    ("functions", {"functions": [{"name": "f"}]}),
    ("function_call", {"function_call": "auto"}),
    ("audio", {"audio": {"voice": "alloy", "format": "wav"}}),
    ("modalities", {"modalities": ["text", "audio"]}),
    ("prediction", {"prediction": {"type": "content", "content": "a"}}),
    ("web_search_options", {"web_search_options": {"search_context_size": "low"}}),
    ("logprob_token_ids", {"logprob_token_ids": [320], "logprobs": True}),
    ("messages.0.content.1", part("image_url", image_url={"url": "http://example.org/a.png"})),
    ("messages.0.content.1", part("input_audio", input_audio={"data": "", "format": "wav"})),
    ("messages.0.content.1", part("video_url", video_url={"url": "http://example.org/a.mp4"})),
    ("messages.0.content.1", part("file", file={"file_id": "f"})),
    ("messages.0.content.1", part("prompt_embeds", data="AAAA")),
    ("messages.1.tool_calls.0", after(tool_calls=[CUSTOM_CALL])),
    ("messages.1.function_call", after(function_call={"name": "f", "arguments": "{}"})),
]
UNKNOWN_TOOLS: list[tuple[str, dict[str, Any]]] = [
    ("messages.1.tool_calls.0.type", after(tool_calls=[{"id": "a", "type": "wizard", "wizard": {}}])),
    ("messages.1.tool_calls.0.type", after(tool_calls=[{"id": "a", "custom": {"name": "f", "input": "x"}}])),
    ("messages.1.tool_calls.0.function", after(tool_calls=[{"id": "a", "type": "function", "function": None}])),
    (
        "messages.1.tool_calls.0.function.arguments",
        after(tool_calls=[{"id": "a", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]),
    ),
    (
        "messages.1.tool_calls.0.function.arguments",
        after(tool_calls=[{"id": "a", "type": "function", "function": {"name": "f"}}]),
    ),
    ("messages", {"messages": [{"role": "function", "name": "f", "content": "x"}]}),
    ("tools.0.type", {"tools": [CUSTOM_TOOL]}),
    ("tools.1.type", {"tools": [FUNCTION, CUSTOM_TOOL]}),
    ("tools.0.type", {"tools": [{"type": "web_search"}]}),
    ("tool_choice.function", {"tools": [FUNCTION], "tool_choice": CUSTOM_TOOL}),
    (
        "tool_choice.function",
        {"tools": [FUNCTION], "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}},
    ),
]
COMPLETION_ONLY: list[tuple[str, dict[str, Any]]] = [
    ("prompt_embeds", {"prompt_embeds": "AAAA"}),
    ("suffix", {"suffix": "the end"}),
    ("prompt", {"prompt": [5, 320]}),
    ("prompt", {"prompt": [[5], [6, 320]]}),
]

RESPONSES_ONLY: list[tuple[str, dict[str, Any]]] = [
    ("messages", CHAT),
    ("max_tokens", {"max_tokens": 5}),
    ("max_completion_tokens", {"max_completion_tokens": 5}),
    ("response_format", {"response_format": {"type": "json_object"}}),
    ("reasoning_effort", {"reasoning_effort": "low"}),
    ("functions", {"functions": [{"name": "f"}]}),
    ("function_call", {"function_call": "auto"}),
    ("n", {"n": 2}),
    ("background", {"background": True}),
    ("background_options", {"background_options": {"completion_window": "2h"}}),
    ("previous_response_id", {"previous_response_id": "resp_1"}),
    ("conversation", {"conversation": "conv_1"}),
    ("prompt", {"prompt": {"id": "pmpt_1"}}),
    ("truncation", {"truncation": "auto"}),
    ("moderation", {"moderation": {"model": "m"}}),
    ("previous_input_messages", {"previous_input_messages": [{"role": "user", "content": "Hi"}]}),
    ("enable_response_messages", {"enable_response_messages": True}),
    ("kv_transfer_params", {"kv_transfer_params": {"prompt_token_ids": [5, 6]}}),
]


def named(cases: list[tuple[str, dict[str, Any]]]) -> Any:
    """The cases as parameters of a test, each with its field as name."""
    return pytest.mark.parametrize(("param", "extra"), [pytest.param(*case, id=case[0]) for case in cases])


async def check(client: httpx.AsyncClient, engine: ScriptedEngine, url: str, body: dict[str, Any], param: str) -> None:
    """The request is refused, streaming or not, and nothing reaches the engine."""
    for stream in (False, True):
        response = await client.post(url, json={**body, "stream": stream})
        error = response.json()["error"]
        assert response.status_code == 400, error
        assert error["param"] == param
        assert error["type"] == "invalid_request_error"
    assert engine.prompts == []


@named(EVERYWHERE + CHAT_ONLY + UNKNOWN_TOOLS)
async def test_a_chat_request_is_refused(
    client: httpx.AsyncClient, engine: ScriptedEngine, param: str, extra: dict[str, Any]
) -> None:
    if param == "prompt_logprobs":
        extra = {**extra, "prompt_logprobs": 0}  # more than none while streaming has an error of its own
    await check(client, engine, "/v1/chat/completions", CHAT | extra, param)


@named(EVERYWHERE + COMPLETION_ONLY)
async def test_a_completion_request_is_refused(
    client: httpx.AsyncClient, engine: ScriptedEngine, param: str, extra: dict[str, Any]
) -> None:
    await check(client, engine, "/v1/completions", TEXT | extra, param)


@named(EVERYWHERE + RESPONSES_ONLY + [case for case in CHAT_ONLY if case[0] in TEMPLATES])
async def test_a_request_for_a_response_is_refused(
    client: httpx.AsyncClient, engine: ScriptedEngine, param: str, extra: dict[str, Any]
) -> None:
    if param == "use_beam_search":
        extra = {"use_beam_search": True}
    await check(client, engine, "/v1/responses", {"input": "Hi"} | extra, param)


@named([case for case in CHAT_ONLY if case[0] in ("chat_template", "chat_template_kwargs", "messages.0.content.1")])
async def test_tokenizing_messages_refuses_what_chat_refuses(
    client: httpx.AsyncClient, param: str, extra: dict[str, Any]
) -> None:
    response = await client.post("/tokenize", json=CHAT | extra)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(("url", "more"), [("/tokenize", {}), ("/v1/gate/analyze", {"answer": "Yes"})])
@named([case for case in CHAT_ONLY + UNKNOWN_TOOLS if case[0].startswith("messages.1.") or case[0] == "messages"])
async def test_calls_and_results_of_other_kinds_are_refused_by_every_route(
    client: httpx.AsyncClient, engine: ScriptedEngine, url: str, more: dict[str, Any], param: str, extra: dict[str, Any]
) -> None:
    response = await client.post(url, json=extra | more)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert engine.prompts == []


@pytest.mark.parametrize("message", [{"role": "user"}, {"role": "tool", "tool_call_id": "a"}], ids=["user", "tool"])
@pytest.mark.parametrize("calls", ["x", [3], [CUSTOM_CALL]], ids=repr)
async def test_only_an_assistants_turn_has_calls(
    client: httpx.AsyncClient, engine: ScriptedEngine, message: dict[str, Any], calls: Any
) -> None:
    """In another turn the field is an unknown one; the server failed on it."""
    for own in (message, message | {"tool_calls": calls}):
        response = await client.post("/v1/chat/completions", json={"messages": [own | {"content": "Hi"}]})
        assert response.status_code == 200, response.text
    assert engine.prompts[0]["specialist_prompts"] == engine.prompts[1]["specialist_prompts"]


async def test_only_shared_ids_become_text(client: httpx.AsyncClient) -> None:
    response = await client.post("/detokenize", json={"tokens": [76, 320]})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "tokens"


def test_every_refusal_has_a_case() -> None:
    tested = {param for param, _ in EVERYWHERE + CHAT_ONLY}
    assert {refusal.param for refusal in CHAT_REFUSALS} <= tested
    tested = {param for param, _ in EVERYWHERE + COMPLETION_ONLY}
    assert {refusal.param for refusal in COMPLETION_REFUSALS} <= tested
    tested = {param for param, _ in EVERYWHERE + RESPONSES_ONLY} | TEMPLATES
    assert {refusal.param for refusal in RESPONSES_REFUSALS} <= tested


ACCEPTED: list[dict[str, Any]] = [
    {"best_of": 1},
    {"modalities": ["text"]},
    {"length_penalty": 1.0},
    {"echo": True},
    {"kv_transfer_params": None},
    {"vllm_xargs": {"my_key": "x"}},
    {"logit_bias": {"319": 5}},
    {"allowed_token_ids": list(range(4, 320))},
    {"chat_template_kwargs": {"enable_thinking": False}},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "there"}]}]},
]


@pytest.mark.parametrize("extra", ACCEPTED, ids=lambda extra: next(iter(extra)))
async def test_what_is_fused_is_served(
    client: httpx.AsyncClient, engine: ScriptedEngine, extra: dict[str, Any]
) -> None:
    response = await client.post("/v1/chat/completions", json=CHAT | extra)
    assert response.status_code == 200, response.text
    assert len(engine.prompts) == 1
    # echo alone must not turn into a wish for prompt logprobs, as it does in vLLM
    assert engine.params[0].prompt_logprobs is None


@pytest.mark.parametrize(
    ("extra", "num_top"),
    [({"prompt_logprobs": 3}, 3), ({"echo": True, "logprobs": 2}, 2), ({"echo": True}, None), ({"logprobs": 2}, None)],
    ids=["prompt_logprobs", "echo with logprobs", "echo", "logprobs"],
)
async def test_a_completion_may_ask_for_prompt_logprobs(
    client: httpx.AsyncClient, engine: ScriptedEngine, extra: dict[str, Any], num_top: int | None
) -> None:
    await client.post("/v1/completions", json=TEXT | extra)
    assert [params.prompt_logprobs for params in engine.params] == [num_top]


async def test_refusals_are_counted_by_field(client: httpx.AsyncClient) -> None:
    async def count() -> float:
        lines = (await client.get("/metrics")).text.splitlines()
        found = [line for line in lines if line.startswith('fused_refused_requests_total{param="use_beam_search"}')]
        return float(found[0].split()[-1]) if found else 0.0

    before = await count()
    await client.post("/v1/completions", json=TEXT | {"use_beam_search": True})
    assert await count() == before + 1


async def test_an_unknown_field_is_accepted_and_logged_once(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="ultrafuser.server.requests.unsupported")
    for _ in range(2):
        response = await client.post("/v1/chat/completions", json=CHAT | {"flavour": "vanilla"})
        assert response.status_code == 200
    assert [
        record.getMessage() for record in caplog.records if record.name == "ultrafuser.server.requests.unsupported"
    ] == ["requests have the unknown field 'flavour', which has no effect"]


async def test_invented_fields_do_not_fill_the_log(client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="ultrafuser.server.requests.unsupported")
    fields = {f"invented-{number}-" + "x" * 1000: 1 for number in range(2 * MAX_NOTICED_FIELDS)}
    await client.post("/v1/chat/completions", json=CHAT | fields)
    messages = [
        record.getMessage() for record in caplog.records if record.name == "ultrafuser.server.requests.unsupported"
    ]
    assert len(messages) <= MAX_NOTICED_FIELDS
    assert max(len(message) for message in messages) < 200
