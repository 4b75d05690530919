"""A conversation whose answer is weighed reaches every specialist as it was sent, and with text only."""

from typing import Any

import httpx
import pytest

from tests.server.scripted import ScriptedEngine

# vLLM's own request model marks OpenAI's older spelling as deprecated and then reads it itself.
pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated:DeprecationWarning")

URL = "/v1/gate/analyze"
CUT = "ok \U0001f600\U0001f99c \xe9\u6f22"
"""Every letter that is not ASCII is several tokens."""


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


@pytest.mark.parametrize("whole", [{"text": CUT}, body("Hi") | {"answer": CUT}], ids=["text", "answer"])
async def test_parts_of_characters_have_bytes_and_no_text_of_their_own(
    client: httpx.AsyncClient, whole: dict[str, Any]
) -> None:
    """They were decoded one by one, to replacement characters."""
    tokens = (await client.post(URL, json=whole)).json()["tokens"]
    assert len(tokens) == len(CUT.encode()) > len(CUT)
    assert "".join(token["token"] for token in tokens) == CUT
    assert [token["bytes"] for token in tokens] == [[byte] for byte in CUT.encode()]
