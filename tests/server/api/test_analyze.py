"""A conversation whose answer is weighed reaches every specialist as it was sent, and with text only."""

from typing import Any

import httpx
import pytest

from tests.server.scripted import ScriptedEngine

# vLLM's own request model marks OpenAI's older spelling as deprecated and then reads it itself.
pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated:DeprecationWarning")

URL = "/v1/gate/analyze"


def body(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], "answer": "Yes"}


async def test_parts_are_read_by_all_specialists(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    for content in ("Look here", [{"type": "text", "text": "Look here"}]):
        assert (await client.post(URL, json=body(content))).status_code == 200
    whole, parts = engine.prompts
    assert parts["specialist_prompts"] == whole["specialist_prompts"]


async def test_only_text_is_read(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    image = {"type": "image_url", "image_url": {"url": "http://example.org/a.png"}}
    response = await client.post(URL, json=body([{"type": "text", "text": "Look:"}, image]))
    assert (response.status_code, response.json()["error"]["param"]) == (400, "messages.0.content.1")
    assert engine.prompts == []
