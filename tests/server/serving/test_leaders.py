"""Whoever leads, every specialist reads its own template and an answer is read by the fusion's parser."""

import json
from copy import deepcopy
from typing import Any

import httpx
import pytest

from tests.server.scripted import ScriptedEngine
from tests.server.serving.test_rendering import WEATHER
from ultrafuser.server.serving.rendering import FusedRenderer
from ultrafuser.server.settings import ServerSettings

pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated:DeprecationWarning")

CALL = {"name": "get_weather", "arguments": {"city": "Paris"}}


@pytest.fixture
def engine(vllm_config: Any) -> ScriptedEngine:
    """One whose leader is GPT-OSS, for which vLLM has a format of its own; it calls a tool in another one."""
    config = deepcopy(vllm_config)
    config.model_config.hf_config.model_type = "gpt_oss"
    engine = ScriptedEngine(config)
    engine.script = f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>"
    return engine


@pytest.fixture
def settings() -> ServerSettings:
    return ServerSettings(tool_call_parser="hermes")


@pytest.mark.parametrize("stream", [False, True])
async def test_gpt_oss_leads_like_any_other(
    client: httpx.AsyncClient, engine: ScriptedEngine, renderer: FusedRenderer, stream: bool
) -> None:
    """vLLM rendered one prompt past all others, in OpenAI's Harmony format, and asked for a parser that reads it."""
    messages = [{"role": "user", "content": "How is the weather in Paris?"}]
    body = {"model": "tiny", "messages": messages, "tools": [WEATHER], "stream": stream}
    response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    if stream:
        events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
        deltas = [event["choices"][0]["delta"] for event in events if event["choices"]]
        calls = [call["function"] for delta in deltas for call in delta.get("tool_calls") or ()]
        found = {key: "".join(call.get(key) or "" for call in calls) for key in ("name", "arguments")}
    else:
        (call,) = response.json()["choices"][0]["message"]["tool_calls"]
        found = call["function"]
    assert (found["name"], json.loads(found["arguments"])) == (CALL["name"], CALL["arguments"])
    (prompt,) = engine.prompts
    starts = [tokens[:8] for tokens in prompt["specialist_prompts"]]
    assert len({tuple(start) for start in starts}) == 3
    assert renderer.tokenizer.decode(prompt["specialist_prompts"][0]).startswith("<|im_start|>user\n")
