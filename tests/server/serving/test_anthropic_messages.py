"""/v1/messages over a scripted engine: what is said of an answer, whole and streamed, and of what is wrong."""

import asyncio
import json
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import httpx
import pytest
from pydantic import SecretStr
from vllm.entrypoints.serve.engine.protocol import UsageInfo
from vllm.exceptions import GenerationError, QueueOverflowError
from vllm.v1.engine.exceptions import EngineDeadError

from tests.server.scripted import SCRIPT, ScriptedEngine
from ultrafuser.gating.model.fusion import FusedModelInfo, FusionConfig
from ultrafuser.server.api import response as api_response
from ultrafuser.server.app import create_app
from ultrafuser.server.dialects import ANTHROPIC
from ultrafuser.server.engine.client.nonfinite import NonfiniteOutputError
from ultrafuser.server.health import Readiness
from ultrafuser.server.serving import message_events
from ultrafuser.server.serving.message_answers import as_far_as_told, stop_of
from ultrafuser.server.serving.message_events import MessageEvents
from ultrafuser.server.serving.serving import build_serving
from ultrafuser.server.settings import ServerSettings

# vLLM's own request model marks OpenAI's older spelling as deprecated and then reads it itself.
pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated:DeprecationWarning")

URL = "/v1/messages"
USER: dict[str, Any] = {"role": "user", "content": "Hi"}
HI: dict[str, Any] = {"model": "tiny", "max_tokens": 100, "messages": [USER]}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
TOOL: dict[str, Any] = {"name": "get_weather", "input_schema": SCHEMA}
ANY = {"tools": [TOOL], "tool_choice": {"type": "any"}}
ARGUMENTS = '{"city": "Oslo", "days": 2}'
CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>'


class PatientEngine(ScriptedEngine):
    """Thinks for `delay_seconds` before its first token."""

    delay_seconds = 0.0

    async def generate(self, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        """As the scripted engine's."""
        await asyncio.sleep(self.delay_seconds)
        outputs = super().generate(*args, **kwargs)
        try:
            async for output in outputs:
                yield output
        finally:
            await outputs.aclose()  # type: ignore[attr-defined]


@pytest.fixture
def engine(vllm_config: Any) -> PatientEngine:
    """An engine that may be slow."""
    return PatientEngine(vllm_config)


@pytest.fixture
def settings(request: pytest.FixtureRequest) -> ServerSettings:
    """A server that reads hermes' calls and shows signs of life at once; a parameter adds to its settings."""
    return ServerSettings(tool_call_parser="hermes", keep_alive_interval=0.05, **getattr(request, "param", {}))


@pytest.fixture(scope="module")
def verdicts() -> OrderedDict[bytes, str | None]:
    """What is known of constraints, each of which is tried out once."""
    return OrderedDict()


@pytest.fixture
async def client(
    engine: PatientEngine,
    fusion: FusionConfig,
    info: FusedModelInfo,
    settings: ServerSettings,
    verdicts: OrderedDict[bytes, str | None],
) -> AsyncIterator[httpx.AsyncClient]:
    """An HTTP client of the app, in this process."""
    serving = build_serving(engine, fusion, info, settings)
    serving.grammars._verdicts = verdicts
    transport = httpx.ASGITransport(create_app(serving, settings, Readiness(is_warm=True)), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client
    await serving.grammars.close()


async def ask(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    """A whole answer."""
    response = await client.post(URL, json=HI | fields)
    assert response.status_code == 200, response.text
    return response.json()


async def events(client: httpx.AsyncClient, **fields: Any) -> list[dict[str, Any]]:
    """A stream's events; each is named as its data says."""
    response = await client.post(URL, json=HI | fields | {"stream": True})
    assert response.headers["content-type"].startswith("text/event-stream"), response.text
    found = []
    for lines in response.text.removesuffix("\n\n").split("\n\n"):
        name, data = lines.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def put_together(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a client makes of a stream, which is checked for its order."""
    start, *middle, end, stop = [event for event in found if event["type"] != "ping"]
    assert (start["type"], end["type"], stop) == ("message_start", "message_delta", {"type": "message_stop"})
    message = start["message"]
    assert message["content"] == []
    open_block: int | None = None
    arguments = ""
    for event in middle:
        if event["type"] == "content_block_start":
            assert open_block is None
            open_block, arguments = event["index"], ""
            assert open_block == len(message["content"])
            message["content"].append(event["content_block"])
        else:
            assert event["index"] == open_block
            block, delta = message["content"][-1], event.get("delta", {})
            if event["type"] == "content_block_stop":
                open_block = None
            elif block["type"] == "text":
                block["text"] += delta["text"]
            else:
                arguments += delta["partial_json"]
                block["input"] = as_far_as_told(arguments)
    assert open_block is None
    return message | end["delta"] | {"usage": message["usage"] | end["usage"]}


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    """A message but for what differs each time."""
    assert message["id"].startswith("msg_")
    content = [{name: value for name, value in block.items() if name != "id"} for block in message["content"]]
    return message | {"id": "", "content": content}


async def check_error(response: httpx.Response, status: int, kind: str, words: str) -> None:
    """The response is Anthropic's error object and nothing else."""
    assert response.status_code == status, response.text
    assert set(response.json()) == {"type", "error", "request_id"}
    assert response.json()["type"] == "error"
    assert response.json()["request_id"] == response.headers["request-id"] == response.headers["x-request-id"]
    error = response.json()["error"]
    assert error["type"] == kind
    assert words in error["message"]


async def test_an_answer_is_a_message(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    answer = await ask(client)
    num_prompt = len(engine.prompts[0]["prompt_token_ids"])
    usage = {"input_tokens": num_prompt, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}
    assert answer.pop("id").startswith("msg_")
    assert answer.pop("usage") == usage | {"output_tokens": 8}
    assert answer == {
        "type": "message",
        "role": "assistant",
        "model": "tiny",
        "content": [{"type": "text", "text": SCRIPT}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
    }


SCRIPTS = [
    SCRIPT,
    "",
    CALL,
    f"I look. {CALL}\n{CALL}",
    f"{CALL} That is all.",
    f"{CALL[:-25]}",
    "<tool_call>no</tool_call>",
]


@pytest.mark.parametrize("script", SCRIPTS, ids=range(len(SCRIPTS)))
@pytest.mark.parametrize("max_tokens", [200, 9, 40])
async def test_a_stream_says_what_the_whole_answer_says(
    client: httpx.AsyncClient, engine: ScriptedEngine, script: str, max_tokens: int
) -> None:
    engine.script = script or "x"
    fields = {"max_tokens": max_tokens, "tools": [TOOL]}
    if not script:
        fields |= {"max_tokens": 1, **ANY}
        engine.script = CALL
    whole, streamed = (
        without_ids(await ask(client, **fields)),
        without_ids(put_together(await events(client, **fields))),
    )
    # Text that stands after a call is a block of its own only where it came after it.
    texts = [[b["text"] for b in m["content"] if b["type"] == "text"] for m in (whole, streamed)]
    assert "".join(texts[0]) == "".join(texts[1])
    calls = [[b for b in m.pop("content") if b["type"] == "tool_use"] for m in (whole, streamed)]
    assert calls[0] == calls[1]
    assert streamed == whole


def call(index: int, arguments: str, **begun: Any) -> dict[str, Any]:
    """A chat's delta that begins a call or goes on with one."""
    function = {"arguments": arguments} | ({"name": "look"} if begun else {})
    return {"tool_calls": [{"index": index, "function": function, **begun}]}


DELTAS: list[tuple[list[dict[str, Any]], list[str]]] = [
    ([{"content": "a"}, {"content": "b"}], ["ab"]),
    ([{"content": "a"}, call(0, "", id="x"), call(0, '{"b":'), call(0, "1}")], ["a", '{"b":1}']),
    ([call(0, "{}", id="x"), {"content": "a"}, {"content": "b"}, call(1, "{}", id="y")], ["{}", "ab", "{}"]),
    ([call(0, '{"b"', id="x"), {"content": "a"}, call(0, ":1}"), {"content": "c"}], ['{"b":1}', "ac"]),
    ([call(0, '{"b"', id="x"), {"content": "a"}], ['{"b"', "a"]),
    ([call(0, '{"b"', id="x"), {"content": "a"} | call(0, ":1}")], ['{"b":1}', "a"]),
    ([{"tool_calls": [*call(0, "{}", id="x")["tool_calls"], *call(1, "[]", id="y")["tool_calls"]]}], ["{}", "[]"]),
    ([{"content": "a"} | call(0, "{}", id="x")], ["a", "{}"]),
    ([{}], [""]),
]


@pytest.mark.parametrize(("deltas", "expected"), DELTAS)
async def test_one_block_is_open_at_a_time(deltas: list[dict[str, Any]], expected: list[str]) -> None:
    """Deltas of text with the index of a call made clients fail, and two calls in one delta were one."""

    async def chunks() -> AsyncGenerator[str, None]:
        yield "data: {}\n\n"
        for delta in deltas:
            yield f"data: {json.dumps({'choices': [{'delta': delta}]})}\n\n"
        yield "data: [DONE]\n\n"

    made = [
        json.loads(event.split("data: ")[1]) async for event in MessageEvents("chatcmpl-1", "tiny", 5, 5).of(chunks())
    ]
    put_together(made)
    blocks = [""] * sum(event["type"] == "content_block_start" for event in made)
    for event in made:
        if event["type"] == "content_block_delta":
            blocks[event["index"]] += event["delta"].get("text") or event["delta"]["partial_json"]
    assert blocks == expected


async def test_a_call_is_demanded_and_made(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = CALL
    for choice in ({"type": "any"}, {"type": "tool", "name": "get_weather"}):
        answer = await ask(client, tools=[TOOL], tool_choice=choice)
        (block,) = answer["content"]
        assert (block["name"], block["input"]) == ("get_weather", {"city": "Oslo", "days": 2})
        assert answer["stop_reason"] == "tool_use"
        assert "Oslo" not in engine.params[-1].structured_outputs.structural_tag
        assert '"city"' in json.dumps(json.loads(engine.params[-1].structured_outputs.structural_tag))


@pytest.mark.parametrize("max_tokens", [1, 5, 30, 45])
async def test_a_demanded_call_that_the_limit_cuts_is_an_answer(
    client: httpx.AsyncClient, engine: ScriptedEngine, max_tokens: int
) -> None:
    """Its arguments were read as JSON, which they are not: 400, after everything was generated."""
    engine.script = CALL
    answer = await ask(client, max_tokens=max_tokens, **ANY)
    assert answer["stop_reason"] == "max_tokens"
    assert [block.get("text", "") for block in answer["content"]] == [""]
    assert answer["content"] == [{"type": "text", "text": ""}] or answer["content"][0]["name"] == "get_weather"


async def test_parallel_calls_can_be_forbidden(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = f"{CALL}\n{CALL}"
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    for made in (
        await ask(client, max_tokens=500, tools=[TOOL], tool_choice=choice),
        put_together(await events(client, max_tokens=500, tools=[TOOL], tool_choice=choice)),
    ):
        assert [block["type"] for block in made["content"]] == ["tool_use"]


@pytest.mark.parametrize("stream", [False, True])
async def test_the_contexts_end_is_told_from_the_limits(
    client: httpx.AsyncClient, engine: ScriptedEngine, stream: bool
) -> None:
    engine.script = "word " * 5000
    room = engine.model_config.max_model_len - (await ask(client, max_tokens=1))["usage"]["input_tokens"]
    for max_tokens, reason in (
        (room, "max_tokens"),
        (room + 1, "model_context_window_exceeded"),
        (32000, "model_context_window_exceeded"),
    ):
        made = (
            put_together(await events(client, max_tokens=max_tokens))
            if stream
            else await ask(client, max_tokens=max_tokens)
        )
        assert (made["stop_reason"], made["usage"]["output_tokens"]) == (reason, room)


@pytest.mark.parametrize(
    ("finish_reason", "matched", "calls", "expected"),
    [
        ("stop", None, [], ("end_turn", None)),
        ("stop", 7, [], ("end_turn", None)),
        ("stop", "END", [], ("stop_sequence", "END")),
        ("stop", None, [ARGUMENTS], ("tool_use", None)),
        ("tool_calls", None, [ARGUMENTS], ("tool_use", None)),
        ("tool_calls", "END", [ARGUMENTS], ("tool_use", None)),
        ("tool_calls", "END", [ARGUMENTS, ARGUMENTS[:9]], ("stop_sequence", "END")),
        ("length", None, [ARGUMENTS], ("max_tokens", None)),
    ],
)
def test_why_an_answer_ended(finish_reason: str, matched: Any, calls: list[str], expected: Any) -> None:
    assert stop_of(finish_reason, matched, calls, UsageInfo(completion_tokens=5), 5) == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", {}),
        (ARGUMENTS, {"city": "Oslo", "days": 2}),
        ('{"city": "Oslo", "da', {"city": "Oslo"}),
        ("[1", {}),
        ("x", {}),
    ],
)
def test_arguments_that_are_cut_off_are_read_as_far_as_they_go(arguments: str, expected: dict[str, Any]) -> None:
    assert as_far_as_told(arguments) == expected


async def test_weights_are_told_to_those_who_ask(client: httpx.AsyncClient) -> None:
    whole = await ask(client, gate_weights=True)
    found = await events(client, gate_weights=True)
    assert whole["specialists"] == found[0]["message"]["specialists"] == ["text", "code", "math"]
    assert len(whole["gate_weights"]["content"]) == whole["usage"]["output_tokens"]
    told = [event["gate_weights"] for event in found if "gate_weights" in event]
    assert [weights for own in told for weights in own["content"]] == whole["gate_weights"]["content"]
    assert [own["mean"] for own in told if "mean" in own] == [whole["gate_weights"]["mean"]]
    await check_error(
        await client.post(URL, json=HI | {"gate_weights": 1}), 400, "invalid_request_error", "gate_weights: "
    )


COUNTED: list[dict[str, Any]] = [
    {},
    {"system": "Be brief. " * 30},
    {"tools": [TOOL], "system": [{"type": "text", "text": "Be brief."}]},
    {"tools": [TOOL], "tool_choice": {"type": "none"}},
    {"messages": [USER, {"role": "assistant", "content": "So it"}]},
    {"thinking": {"type": "enabled", "budget_tokens": 1024}, "max_tokens": 2000},
]


@pytest.mark.parametrize("fields", COUNTED)
async def test_tokens_are_counted_as_they_are_read(
    client: httpx.AsyncClient, engine: ScriptedEngine, fields: dict[str, Any]
) -> None:
    """System text and tools were left out of the count."""
    response = await client.post(
        f"{URL}/count_tokens?beta=true", json={n: v for n, v in (HI | fields).items() if n != "max_tokens"}
    )
    assert response.json() == {"input_tokens": (await ask(client, **fields))["usage"]["input_tokens"]}
    assert response.json()["input_tokens"] == len(engine.prompts[-1]["prompt_token_ids"])


async def test_what_is_longer_than_the_context_can_be_counted_but_not_answered(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    long = {"messages": [{"role": "user", "content": "word " * 5000}]}
    counted = await client.post(f"{URL}/count_tokens", json={"model": "tiny"} | long)
    assert counted.json()["input_tokens"] > engine.model_config.max_model_len
    for stream in (False, True):
        response = await client.post(URL, json=HI | long | {"stream": stream})
        await check_error(response, 400, "invalid_request_error", "prompt is too long: ")


async def test_a_last_turn_of_the_assistant_is_gone_on_with(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    await ask(client, messages=[USER, {"role": "assistant", "content": "So it"}])
    for prompt, specialist in zip(engine.prompts[-1]["specialist_prompts"], range(3), strict=True):
        text = engine.renderer.get_tokenizer().decode(prompt)
        assert text.endswith("So it"), (specialist, text)


async def test_a_conversation_is_rendered_as_on_the_chat_route(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    tool = {"name": "get_weather", "input_schema": SCHEMA, "cache_control": {"type": "ephemeral"}}
    call = {"type": "tool_use", "id": "a", "name": "get_weather", "input": {"city": "Oslo"}}
    result = {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "Rain."}]}
    turns = [
        USER,
        {"role": "assistant", "content": [{"type": "text", "text": "Let me see."}, call]},
        {"role": "user", "content": [result, {"type": "text", "text": "And?"}]},
        {"role": "system", "content": "Be quick."},
    ]
    await ask(client, system="Be brief.", messages=turns, tools=[tool])
    function = {"name": "get_weather", "arguments": '{"city": "Oslo"}'}
    calls = [{"id": "a", "type": "function", "function": function}]
    chat = [
        {"role": "system", "content": "Be brief."},
        USER,
        {"role": "assistant", "content": "Let me see.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "a", "content": "Rain."},
        {"role": "user", "content": "And?"},
        {"role": "system", "content": "Be quick."},
    ]
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}}]
    response = await client.post("/v1/chat/completions", json={"messages": chat, "tools": tools})
    assert response.status_code == 200
    own, chats = [prompt["specialist_prompts"] for prompt in engine.prompts]
    assert own == chats


async def test_claude_codes_first_line_is_no_part_of_the_prompt(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    for number in range(2):
        first = f"x-anthropic-billing-header: cc_version=2.1.37.0d9; cc_entrypoint=cli; cch=fa69{number};"
        await ask(client, system=[{"type": "text", "text": text} for text in (first, "Be brief.")])
    await ask(client, system="Be brief.")
    one, two, three = [prompt["specialist_prompts"] for prompt in engine.prompts]
    assert one == two == three


async def test_what_is_unknown_is_accepted_and_not_rendered(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    """`defer_loading` of a tool was a 400."""
    marked = {"cache_control": {"type": "ephemeral"}}
    await ask(client, tools=[TOOL], system="Be brief.")
    await ask(
        client,
        tools=[
            TOOL | marked | {"defer_loading": True, "eager_input_streaming": True},
            {"type": "web_search_20250305", "name": "web_search"},
        ],
        system=[{"type": "text", "text": "Be brief.", **marked}],
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        metadata={"user_id": "user_1"},
        service_tier="auto",
    )
    plain, rich = [prompt["specialist_prompts"] for prompt in engine.prompts]
    assert plain == rich


WRONG: list[tuple[str, dict[str, Any]]] = [
    ("messages.0.content.0: ", {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}),
    ("messages: ", {"messages": [{"role": "system", "content": ""}]}),
    ("max_tokens: ", {"max_tokens": None}),
    ("max_tokens: ", {"max_tokens": 0}),
    ("max_tokens: ", {"max_tokens": "5"}),
    ("model: ", {"model": None}),
    ("temperature: ", {"temperature": "hot"}),
    ("temperature", {"temperature": 3}),
    ("top_p", {"top_p": 2}),
    ("top_k", {"top_k": -5}),
    ("stop_sequences: ", {"stop_sequences": [""]}),
    ("stop_sequences: ", {"stop_sequences": ["a"] * 5}),
    ("stop_sequences: ", {"stop_sequences": "a"}),
    ("thinking: ", {"thinking": {"type": "deep"}}),
    ("thinking.budget_tokens", {"thinking": {"type": "enabled", "budget_tokens": 1024}}),
    ("output_config.effort: ", {"output_config": {"effort": "great"}}),
    (
        "output_config.format.schema: ",
        {"output_config": {"format": {"type": "json_schema", "schema": {"if": {}, "then": {}}}}},
    ),
    ("tools.0.input_schema: ", {"tools": [{"name": "a"}]}),
    (
        "tools.1.input_schema: ",
        {
            "tools": [
                {"type": "bash_20250124", "name": "bash"},
                {"name": "a", "strict": True, "input_schema": {"type": "object", "if": {}, "then": {}}},
            ]
        },
    ),
    ("tool_choice", {"tool_choice": {"type": "any"}}),
    ("tool_choice", {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "other"}}),
    ("tool_choice", {"tools": [TOOL], "tool_choice": {"type": "tool"}}),
    (
        "tool_choice",
        {"tools": [{"type": "bash_20250124", "name": "bash"}], "tool_choice": {"type": "tool", "name": "bash"}},
    ),
    ("kv_transfer_params", {"kv_transfer_params": {"prompt_token_ids": [1, 2]}}),
    ("ec_transfer_params", {"ec_transfer_params": {"a": 1}}),
    ("vllm_xargs", {"vllm_xargs": {"specialist_prompts": "x"}}),
    ("request_id", {"request_id": "../x"}),
    ("previous_input_messages", {"previous_input_messages": [USER]}),
    ("enable_response_messages", {"enable_response_messages": True}),
    ("output_format", {"output_format": {"type": "json_schema", "schema": {}}}),
    ("chat_template_kwargs", {"chat_template_kwargs": {"chat_template": "x"}}),
]


@pytest.mark.parametrize(("words", "fields"), WRONG, ids=[f"{n}-{words}" for n, (words, _) in enumerate(WRONG)])
async def test_what_is_wrong_is_named_as_it_was_sent(
    client: httpx.AsyncClient, engine: ScriptedEngine, words: str, fields: dict[str, Any]
) -> None:
    for stream in (False, True):
        response = await client.post(URL, json=HI | fields | {"stream": stream})
        await check_error(response, 400, "invalid_request_error", words)
        assert response.json()["error"]["message"].startswith(words)
    assert engine.prompts == []


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "kind"),
    [
        ("POST", URL, b"{", 400, "invalid_request_error"),
        ("POST", URL, b"[]", 400, "invalid_request_error"),
        ("POST", f"{URL}/count_tokens", b"{}", 400, "invalid_request_error"),
        ("GET", URL, b"", 405, "invalid_request_error"),
        ("POST", f"{URL}/batches", b"{}", 404, "not_found_error"),
        ("POST", f"{URL}/", b"{}", 404, "not_found_error"),
        ("POST", URL, b" " * 2**26, 413, "request_too_large"),
    ],
)
async def test_errors_outside_of_the_routes_are_anthropics_too(
    client: httpx.AsyncClient, method: str, path: str, body: bytes, status: int, kind: str
) -> None:
    headers = {"content-type": "application/json"}
    await check_error(await client.request(method, path, content=body, headers=headers), status, kind, "")


async def test_other_paths_speak_openais(client: httpx.AsyncClient) -> None:
    for path in ("/v1/messages2", "/v1/nothing", "/messages"):
        assert set((await client.get(path)).json()) == {"error"}


async def test_what_is_not_json_is_not_read(client: httpx.AsyncClient) -> None:
    response = await client.post(URL, content=b"{}", headers={"content-type": "text/plain"})
    await check_error(response, 415, "invalid_request_error", "application/json")


async def test_an_unknown_model_is_not_found(client: httpx.AsyncClient) -> None:
    for path in (URL, f"{URL}/count_tokens"):
        fields = {name: value for name, value in HI.items() if path == URL or name != "max_tokens"}
        response = await client.post(path, json=fields | {"model": "claude"})
        await check_error(response, 404, "not_found_error", "claude")


FAILURES = [
    (EngineDeadError(), 500, "api_error", "stopped"),
    (NonfiniteOutputError(), 500, "api_error", "not a finite number"),
    (GenerationError("it broke"), 500, "api_error", ""),
    (RuntimeError("secret"), 500, "api_error", "log has the reason"),
]


@pytest.mark.parametrize(("failure", "status", "kind", "words"), FAILURES, ids=lambda value: type(value).__name__)
async def test_a_failure_is_told_before_the_first_token_by_its_status(
    client: httpx.AsyncClient, engine: ScriptedEngine, failure: Exception, status: int, kind: str, words: str
) -> None:
    engine.failure = failure
    for stream in (False, True):
        await check_error(await client.post(URL, json=HI | {"stream": stream}), status, kind, words)


@pytest.mark.parametrize(("failure", "status", "kind", "words"), FAILURES, ids=lambda value: type(value).__name__)
async def test_a_failure_ends_a_stream_without_an_end(
    client: httpx.AsyncClient, engine: ScriptedEngine, failure: Exception, status: int, kind: str, words: str
) -> None:
    """A stream that failed ended as if all were said."""
    engine.failure, engine.fails_at = failure, 3
    *before, last = await events(client)
    assert [event["type"] for event in before if event["type"] != "content_block_delta"] == [
        "message_start",
        "content_block_start",
    ]
    assert (last["type"], last["error"]["type"]) == ("error", kind)
    assert words in last["error"]["message"]
    assert "secret" not in last["error"]["message"]


async def test_a_silent_stream_begins_at_once_and_shows_that_it_lives(
    client: httpx.AsyncClient, engine: PatientEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients gave up after 20 s without a byte."""
    for module, name in ((message_events, "START_SECONDS"), (api_response, "EARLY_SECONDS")):
        monkeypatch.setattr(module, name, 0.01)
    engine.delay_seconds = 0.4
    found = await events(client)
    assert [event["type"] for event in found[:4]] == ["message_start", "ping", "ping", "ping"]
    num_prompt = len(engine.prompts[0]["prompt_token_ids"])
    assert found[0]["message"]["usage"]["input_tokens"] == num_prompt
    assert without_ids(put_together(found)) == without_ids(await ask(client))


async def test_a_client_that_leaves_before_the_first_token_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(message_events, "START_SECONDS", 0.01)
    is_closed = False

    async def chunks() -> AsyncGenerator[str, None]:
        nonlocal is_closed
        try:
            await asyncio.Event().wait()
            yield "never"
        finally:
            is_closed = True

    made = MessageEvents("chatcmpl-1", "tiny", 5, 5).of(chunks())
    assert "message_start" in await anext(made)
    await made.aclose()
    assert is_closed


async def test_a_failure_after_an_early_start_ends_the_stream(
    client: httpx.AsyncClient, engine: PatientEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in ((message_events, "START_SECONDS"), (api_response, "EARLY_SECONDS")):
        monkeypatch.setattr(module, name, 0.01)
    engine.delay_seconds, engine.failure = 0.1, EngineDeadError()
    found = [event for event in await events(client) if event["type"] != "ping"]
    assert [event["type"] for event in found] == ["message_start", "error"]


@pytest.mark.parametrize("settings", [{"request_timeout": 2.0}], indirect=True)
async def test_the_deadline_ends_a_stream_and_an_answer(
    client: httpx.AsyncClient, engine: PatientEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in ((message_events, "START_SECONDS"), (api_response, "EARLY_SECONDS")):
        monkeypatch.setattr(module, name, 0.01)
    engine.delay_seconds = 60
    found = [event for event in await events(client) if event["type"] != "ping"]
    assert [event["type"] for event in found] == ["message_start", "error"]
    assert found[1]["error"]["type"] == "timeout_error"
    await check_error(await client.post(URL, json=HI), 504, "timeout_error", "2 s")


def test_a_call_is_told_to_its_end_before_the_next_one() -> None:
    """A parser may tell the rest of an earlier call last."""
    blocks = message_events._Blocks()
    begun = {"index": 0, "id": "a", "function": {"name": "f", "arguments": '{"x": '}}
    other = {"index": 1, "id": "b", "function": {"name": "g", "arguments": '{"y": 2}'}}
    told = [*blocks.grow({"tool_calls": [begun, other]}), *blocks.grow({"content": "So."})]
    told += [*blocks.grow({"tool_calls": [{"index": 0, "function": {"arguments": "1}"}}]}), *blocks.end()]
    arguments: dict[int, str] = {}
    for kind, data in told:
        if kind == "content_block_delta" and "partial_json" in data["delta"]:
            arguments[data["index"]] = arguments.get(data["index"], "") + data["delta"]["partial_json"]
    assert sorted(arguments.values()) == ['{"x": 1}', '{"y": 2}']
    kinds = [kind for kind, _ in told if kind != "content_block_delta"]
    assert kinds == ["content_block_start", "content_block_stop"] * 3


KEYS = {"api_key": (SecretStr("one"), SecretStr("two")), "requests_per_minute": 2}


@pytest.mark.parametrize("settings", [KEYS], indirect=True)
async def test_keys_are_asked_for_in_anthropics_words(client: httpx.AsyncClient) -> None:
    for headers in ({}, {"x-api-key": "three"}, {"x-api-key": "one", "authorization": "Bearer two"}):
        response = await client.post(URL, json=HI, headers=headers)
        await check_error(response, 401, "authentication_error", "x-api-key")
    for headers in ({"x-api-key": "one"}, {"x-api-key": "one", "authorization": "Bearer one"}):
        assert (await client.post(URL, json=HI, headers=headers)).status_code == 200
    response = await client.post(URL, json=HI, headers={"authorization": "Bearer one"})
    await check_error(response, 429, "rate_limit_error", "")
    assert response.headers["retry-after"]
    assert (await client.get("/v1/models", headers={"x-api-key": "two"})).status_code == 200


async def test_a_full_server_says_so(client: httpx.AsyncClient, engine: PatientEngine) -> None:
    engine.refusal = QueueOverflowError()
    await check_error(await client.post(URL, json=HI), 503, "overloaded_error", "try again later")


def test_no_interval_makes_the_silence_longer_than_clients_bear() -> None:
    assert ANTHROPIC.longest_silence_seconds == 10
