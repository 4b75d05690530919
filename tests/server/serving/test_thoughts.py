"""Thinking over HTTP: thought and answer apart, streamed and whole, and one decision for all specialists."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from vllm.engine.arg_utils import AsyncEngineArgs

from tests.fakes import build_tokenizer, write_tiny_fusion
from tests.server.scripted import ScriptedEngine
from tests.server.test_app import URL, check_error, events
from ultrafuser.gating.model.fusion import FusedModelInfo, FusionConfig, inspect_fusion, load_fusion
from ultrafuser.server.engine.shared.options import engine_arguments
from ultrafuser.server.engine.shared.thought import THOUGHT, Thought
from ultrafuser.server.serving.responses.response_stream import ResponseStream
from ultrafuser.server.settings import ServerSettings

# vLLM's own request model marks OpenAI's older spelling as deprecated and then reads it itself.
pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated:DeprecationWarning")

MARKERS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
OPENS = """{%- for m in messages %}<|im_start|>{{ m.role }}
{%- if m.reasoning_content %}
<think>{{ m.reasoning_content }}</think>{% endif %}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think></think>
{% else %}<think>
{% endif %}{% endif %}"""
"""Thinks unless it is told not to, and shows what was thought before."""

OTHER = """{% for m in messages %}{{ m.role }}: {{ m.content }}
{% endfor %}{% if add_generation_prompt %}assistant: {% if thinking is not defined or thinking %}<think>{% endif %}\
{% endif %}"""
"""Asks by another name, and leaves out what was thought before."""

LEAVES = """{% for m in messages %}{{ m.role }}: {{ m.content }}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""
"""Knows nothing of thoughts."""

THOUGHT_TEXT, ANSWER = "Let me see: 2 < 3.", "It is 3."
SCRIPT = f"{THOUGHT_TEXT}</think>{ANSWER}"


def written(folder: Path, *templates: str) -> FusionConfig:
    """A fusion whose specialists have these templates."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(templates):
        (folder / f"{number}.jinja").write_text(text)
    paths = [f"./{number}.jinja" for number in range(len(templates))]
    return load_fusion(write_tiny_fusion(folder, templates=paths, markers=MARKERS, num_layers=(1, 1, 1)))


@pytest.fixture(scope="session")
def fusion(tmp_path_factory: pytest.TempPathFactory) -> FusionConfig:
    """Three thinking specialists."""
    return written(tmp_path_factory.mktemp("thinking") / "fusion", OPENS, OTHER, OPENS)


@pytest.fixture(scope="session")
def info(fusion: FusionConfig) -> FusedModelInfo:
    """What the fusion is made of."""
    return inspect_fusion(fusion)


@pytest.fixture(scope="session")
def vllm_config(fusion: FusionConfig, info: FusedModelInfo) -> Any:
    """The engine's configuration; no engine is started."""
    return AsyncEngineArgs(**engine_arguments(fusion, info)).create_engine_config()


@pytest.fixture
def settings() -> ServerSettings:
    """A server that tells thoughts apart."""
    return ServerSettings(reasoning_parser="qwen3", tool_call_parser="hermes")


@pytest.fixture
def engine(vllm_config: Any) -> ScriptedEngine:
    """An engine that goes on with the thought that the prompt has opened."""
    engine = ScriptedEngine(vllm_config)
    engine.script = SCRIPT
    return engine


def asked(**fields: Any) -> dict[str, Any]:
    """A body."""
    return {"messages": [{"role": "user", "content": "What is <think> for?"}], **fields}


def told_thought(engine: ScriptedEngine) -> dict[str, Any]:
    """What the engine was told of the last request's thought."""
    thought: dict[str, Any] = (engine.params[-1].extra_args or {})[THOUGHT]
    return thought


async def test_thought_and_answer_come_apart(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    response = (await client.post(URL, json=asked(gate_weights=True, logprobs=True))).json()
    (choice,) = response["choices"]
    assert choice["message"]["reasoning"] == choice["message"]["reasoning_content"] == THOUGHT_TEXT
    assert choice["message"]["content"] == ANSWER
    num_tokens = response["usage"]["completion_tokens"]
    assert len(choice["logprobs"]["content"]) == len(choice["gate_weights"]["content"]) == num_tokens
    details = response["usage"]["completion_tokens_details"]
    tokenizer = build_tokenizer(320, 320, "text", MARKERS)
    assert details["reasoning_tokens"] == len(tokenizer.encode(THOUGHT_TEXT, add_special_tokens=False))
    assert told_thought(engine)["opening"] == "open"


async def test_a_stream_tells_the_same(client: httpx.AsyncClient) -> None:
    response = await client.post(URL, json=asked(stream=True, gate_weights=True, logprobs=True))
    *chunks, last = events(response)
    assert last == "[DONE]"
    choices = [choice for chunk in chunks for choice in json.loads(chunk)["choices"]]
    deltas = [choice["delta"] for choice in choices]
    for name in ("reasoning", "reasoning_content"):
        assert "".join(delta.get(name) or "" for delta in deltas) == THOUGHT_TEXT
    assert "".join(delta.get("content") or "" for delta in deltas) == ANSWER
    weights = [row for choice in choices for row in (choice.get("gate_weights") or {}).get("content", [])]
    logprobs = [row for choice in choices for row in (choice.get("logprobs") or {}).get("content") or []]
    assert len(weights) == len(logprobs) == len(build_tokenizer(320, 320, "x", MARKERS).encode(SCRIPT))


@pytest.mark.parametrize(
    "off",
    [
        {"enable_thinking": False},
        {"thinking": False},
        {"thinking": {"type": "disabled"}},
        {"reasoning_effort": "none"},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"chat_template_kwargs": {"thinking": False}},
    ],
    ids=json.dumps,
)
async def test_one_decision_reaches_every_template(
    client: httpx.AsyncClient, engine: ScriptedEngine, off: dict[str, Any]
) -> None:
    engine.script = ANSWER
    message = (await client.post(URL, json=asked(**off))).json()["choices"][0]["message"]
    assert (message["content"], message.get("reasoning")) == (ANSWER, None)
    assert told_thought(engine)["opening"] == "closed"
    tokenizer = engine.renderer.get_tokenizer()
    text, other, _ = (tokenizer.decode(prompt) for prompt in engine.prompts[-1]["specialist_prompts"])
    assert text.endswith("<think></think>\n")
    assert other.endswith("assistant: ")


async def test_what_users_spell_opens_nothing(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = ANSWER
    await client.post(URL, json=asked(enable_thinking=False))
    assert told_thought(engine)["opening"] == "closed"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"enable_thinking": True, "thinking": False}, "enable_thinking"),
        ({"enable_thinking": False, "reasoning_effort": "high"}, "enable_thinking"),
        ({"enable_thinking": "yes"}, "enable_thinking"),
        ({"thinking": {"type": "much"}}, "thinking.type"),
        ({"thinking": {"type": ["enabled"]}}, "thinking.type"),
        ({"thinking": {"type": "enabled", "budget_tokens": -1}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": 5}, "thinking_token_budget": 6}, "thinking_token_budget"),
        (
            {"messages": [{"role": "assistant", "content": "Hi", "reasoning": "a", "reasoning_content": "b"}]},
            "messages.0.reasoning",
        ),
        (
            {"messages": [{"role": "assistant", "content": "Hi", "reasoning_content": 3}]},
            "messages.0.reasoning_content",
        ),
    ],
)
async def test_fields_that_contradict_each_other_are_named(
    client: httpx.AsyncClient, body: dict[str, Any], param: str
) -> None:
    check_error(await client.post(URL, json=asked(**body)), 400, param, None)


@pytest.mark.parametrize("body", [{"thinking_token_budget": 7}, {"thinking": {"type": "enabled", "budget_tokens": 7}}])
async def test_a_budget_reaches_the_engine(
    client: httpx.AsyncClient, engine: ScriptedEngine, body: dict[str, Any]
) -> None:
    assert (await client.post(URL, json=asked(**body))).status_code == 200
    assert told_thought(engine)["budget"] == 7


async def test_the_engines_own_key_cannot_be_sent(client: httpx.AsyncClient) -> None:
    body = asked(vllm_xargs={THOUGHT: [1]})
    check_error(await client.post(URL, json=body), 400, "vllm_xargs", "unsupported_parameter")


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
async def test_earlier_thoughts_are_shown_where_a_template_shows_them(
    client: httpx.AsyncClient, engine: ScriptedEngine, name: str
) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?", name: "Hm, who is it"}]
    await client.post(URL, json=asked(messages=[*turns, {"role": "user", "content": "Me"}]))
    tokenizer = engine.renderer.get_tokenizer()
    text, other, _ = (tokenizer.decode(prompt) for prompt in engine.prompts[-1]["specialist_prompts"])
    assert "<think>Hm, who is it</think>Yes?" in text
    assert "Hm" not in other
    assert told_thought(engine)["opening"] == "open"


async def test_an_answer_that_is_gone_on_with_has_no_thought_but_one_that_is_open(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    going_on = {"continue_final_message": True, "add_generation_prompt": False}
    for content, opening in (("It", "closed"), ("<think>Let", "open"), ("<think>a</think>It", "closed")):
        turns = [*asked()["messages"], {"role": "assistant", "content": content}]
        response = await client.post(URL, json=asked(messages=turns, **going_on))
        assert response.status_code == 200, response.text
        assert told_thought(engine)["opening"] == opening


async def test_reasoning_can_be_left_out(client: httpx.AsyncClient) -> None:
    message = (await client.post(URL, json=asked(include_reasoning=False))).json()["choices"][0]["message"]
    assert (message["content"], message.get("reasoning"), message.get("reasoning_content")) == (ANSWER, None, None)
    chunks = events(await client.post(URL, json=asked(include_reasoning=False, stream=True)))[:-1]
    deltas = [choice["delta"] for chunk in chunks for choice in json.loads(chunk)["choices"]]
    assert not any(delta.get("reasoning") or delta.get("reasoning_content") for delta in deltas)
    assert "".join(delta.get("content") or "" for delta in deltas) == ANSWER


MESSAGES = "/v1/messages"


async def test_messages_have_thoughts_in_blocks_of_their_own(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    body = asked(model="tiny", max_tokens=2000, thinking={"type": "enabled", "budget_tokens": 1024})
    whole = (await client.post(MESSAGES, json=body)).json()
    thought, text = whole["content"]
    assert (thought["type"], thought["thinking"]) == ("thinking", THOUGHT_TEXT)
    assert text == {"type": "text", "text": ANSWER}
    assert told_thought(engine)["budget"] == 1024
    told = [json.loads(data) for data in events(await client.post(MESSAGES, json=body | {"stream": True}))]
    blocks: dict[int, dict[str, Any]] = {}
    for event in told:
        if event["type"] == "content_block_start":
            blocks[event["index"]] = dict(event["content_block"])
        elif event["type"] == "content_block_delta":
            name = event["delta"]["type"].removesuffix("_delta")
            blocks[event["index"]][name] = blocks[event["index"]].get(name, "") + event["delta"][name]
    assert list(blocks.values()) == [thought, text]
    kinds = [event["type"] for event in told]
    assert kinds.index("content_block_stop") < kinds.index("content_block_start", kinds.index("content_block_stop"))
    turns = [*body["messages"], {"role": "assistant", "content": whole["content"]}, {"role": "user", "content": "So?"}]
    assert (await client.post(MESSAGES, json=body | {"messages": turns})).status_code == 200
    prompt, other, _ = (engine.renderer.get_tokenizer().decode(own) for own in engine.prompts[-1]["specialist_prompts"])
    assert f"<think>{THOUGHT_TEXT}</think>{ANSWER}" in prompt
    assert THOUGHT_TEXT not in other


async def test_messages_can_turn_thinking_off(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = ANSWER
    body = asked(model="tiny", max_tokens=2000, thinking={"type": "disabled"})
    assert (await client.post(MESSAGES, json=body)).json()["content"] == [{"type": "text", "text": ANSWER}]
    assert told_thought(engine)["opening"] == "closed"


async def test_responses_have_thoughts_as_items(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    items: list[Any] = [{"role": "user", "content": "Hi"}]
    body = {"input": items, "reasoning": {"effort": "high"}, "include": ["message.output_text.logprobs"]}
    whole = (await client.post("/v1/responses", json=body)).json()
    thought, message = whole["output"]
    assert (thought["type"], thought["content"]) == ("reasoning", [{"type": "reasoning_text", "text": THOUGHT_TEXT}])
    assert message["content"][0]["text"] == ANSWER
    tokenizer = build_tokenizer(320, 320, "text", MARKERS)
    assert len(message["content"][0]["logprobs"]) == len(tokenizer.encode(ANSWER, add_special_tokens=False))
    reasoning_tokens = whole["usage"]["output_tokens_details"]["reasoning_tokens"]
    assert reasoning_tokens == len(tokenizer.encode(THOUGHT_TEXT, add_special_tokens=False))
    told = [json.loads(data) for data in events(await client.post("/v1/responses", json=body | {"stream": True}))]
    kinds = [event["type"] for event in told]
    deltas = [event["delta"] for event in told if event["type"] == "response.reasoning_text.delta"]
    assert "".join(deltas) == THOUGHT_TEXT
    assert kinds.index("response.output_item.done") < kinds.index("response.output_text.delta")
    assert [item["type"] for item in told[-1]["response"]["output"]] == ["reasoning", "message"]
    assert told_thought(engine)["opening"] == "open"
    items += [*whole["output"], {"role": "user", "content": "So?"}]
    assert (await client.post("/v1/responses", json=body)).status_code == 200
    prompt, other, _ = (engine.renderer.get_tokenizer().decode(own) for own in engine.prompts[-1]["specialist_prompts"])
    assert f"<think>{THOUGHT_TEXT}</think>{ANSWER}" in prompt
    assert THOUGHT_TEXT not in other


CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]


@pytest.mark.parametrize("script", [f"Hm.</think>{CALL}", f"Hm.{CALL}"], ids=["marker", "implicit"])
@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_call_behind_a_thought_is_a_call(
    client: httpx.AsyncClient, engine: ScriptedEngine, script: str, is_stream: bool
) -> None:
    engine.script = script
    response = await client.post(URL, json=asked(tools=TOOLS, stream=is_stream))
    if is_stream:
        choices = [choice for chunk in events(response)[:-1] for choice in json.loads(chunk)["choices"]]
        deltas = [choice["delta"] for choice in choices]
        calls = [call for delta in deltas for call in delta.get("tool_calls") or ()]
        reasoning = "".join(delta.get("reasoning") or "" for delta in deltas)
        arguments = "".join(call["function"].get("arguments") or "" for call in calls)
        reason = choices[-1]["finish_reason"]
    else:
        choice = response.json()["choices"][0]
        reasoning, reason = choice["message"]["reasoning"], choice["finish_reason"]
        arguments = choice["message"]["tool_calls"][0]["function"]["arguments"]
    assert (reasoning, json.loads(arguments), reason) == ("Hm.", {"a": 1}, "tool_calls")


@pytest.mark.parametrize("n", [1, 2])
async def test_a_call_whose_marker_is_spelled_is_a_call_too(
    client: httpx.AsyncClient, engine: ScriptedEngine, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a grammar may have it."""
    engine.script = f"Hm.</think>{CALL}"
    tokenizer = engine.renderer.get_tokenizer()
    encode = type(tokenizer).encode

    def spelled(own: Any, text: str, **options: Any) -> list[int]:
        marker = own.get_vocab()["<tool_call>"]
        ids = encode(own, text, **options)
        split = [encode(own, char, add_special_tokens=False) for char in "<tool_call>"]
        return [
            part
            for token_id in ids
            for part in ([part for own in split for part in own] if token_id == marker else [token_id])
        ]

    monkeypatch.setattr(type(tokenizer), "encode", spelled)
    for choice in (await client.post(URL, json=asked(tools=TOOLS, n=n))).json()["choices"]:
        assert choice["message"]["reasoning"] == "Hm."
        assert json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"]) == {"a": 1}


async def test_thoughts_that_eat_the_limit_end_as_length(client: httpx.AsyncClient) -> None:
    (choice,) = (await client.post(URL, json=asked(max_tokens=5))).json()["choices"]
    assert choice["finish_reason"] == "length"
    assert THOUGHT_TEXT.startswith(choice["message"]["reasoning"])
    assert not choice["message"]["content"]


async def test_tokenize_counts_the_prompt_that_the_chat_would_have(client: httpx.AsyncClient) -> None:
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    counted = await client.post("/tokenize", json=asked(**off))
    assert counted.status_code == 200, counted.text
    chat = (await client.post(URL, json=asked(**off))).json()
    assert counted.json()["count"] == chat["usage"]["prompt_tokens"]


async def test_marks_stay_where_thoughts_are_left_out(client: httpx.AsyncClient) -> None:
    body = asked(include_reasoning=False, gate_weights=True)
    whole = (await client.post(URL, json=body)).json()["choices"][0]["gate_weights"]
    chunks = events(await client.post(URL, json=body | {"stream": True}))[:-1]
    told = [own["gate_weights"] for chunk in chunks for own in json.loads(chunk)["choices"] if "gate_weights" in own]
    assert [row for own in told for row in own["content"]] == whole["content"]
    assert told[-1]["mean"] == whole["mean"]


async def test_messages_name_a_contradiction(client: httpx.AsyncClient) -> None:
    body = asked(model="tiny", max_tokens=9, thinking={"type": "adaptive"})
    response = await client.post(MESSAGES, json=body | {"chat_template_kwargs": {"enable_thinking": False}})
    assert response.status_code == 400
    assert "chat_template_kwargs.enable_thinking: contradicts thinking" in response.json()["error"]["message"]


def test_log_probabilities_are_told_apart_by_token() -> None:
    """Of an event that has the end of the thought and the beginning of the answer."""
    thought = Thought("open", 1, 2)
    entries = [{"token": name, "logprob": 0.0, "bytes": [], "top_logprobs": []} for name in "abcd"]
    choice = {
        "delta": {"reasoning": "a", "content": "cd"},
        "logprobs": {"content": entries},
        "token_ids": [7, 2, 8, 9],
    }
    nothing: Any = None
    stream = ResponseStream({}, nothing, nothing, thought)
    list(stream._take_choice(choice))
    message: Any = stream._items[-1].item("completed")
    assert [entry.token for entry in message.content[0].logprobs] == ["c", "d"]
