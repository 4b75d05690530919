"""The first exchange of agents with a server that has room for it, in the shapes that public sources show."""

import json
from typing import Any

import httpx

from tests.e2e.conftest import WIDE_KEY
from tests.e2e.process import ServerProcess
from tests.response_events import parsed

LARK = """start: begin_patch hunk+ end_patch
begin_patch: "*** Begin Patch" LF
end_patch: "*** End Patch" LF?
hunk: "*** Update File: " /(.+)/ LF
%import common.LF
"""


def instructions(num_chars: int) -> str:
    """A long text that says something else in every line."""
    lines = (f"{number}. Keep rule {number * 7919 % 1000} in mind.\n" for number in range(num_chars))
    text = ""
    while len(text) < num_chars:
        text += next(lines)
    return text


def function(name: str, **properties: str) -> dict[str, Any]:
    """A function as Codex declares it: not strict."""
    schema = {key: {"type": kind} for key, kind in properties.items()}
    parameters = {"type": "object", "properties": schema, "required": [*schema], "additionalProperties": False}
    return {"type": "function", "name": name, "description": f"{name}.", "strict": False, "parameters": parameters}


def text(role: str, content: str) -> dict[str, Any]:
    """A message as Codex sends it."""
    return {"type": "message", "role": role, "content": [{"type": "input_text", "text": content}]}


CODEX_TOOLS = [
    function("exec_command", cmd="string", workdir="string"),
    function("write_stdin", session_id="number", chars="string"),
    function("update_plan", plan="array"),
    function("request_user_input", questions="array"),
    {
        "type": "custom",
        "name": "apply_patch",
        "description": "Edits files.",
        "format": {"type": "grammar", "syntax": "lark", "definition": LARK},
    },
    {"type": "web_search", "external_web_access": False},
    {"type": "local_shell"},
    {"type": "tool_search", "execution": "client", "description": "Finds tools.", "parameters": {"type": "object"}},
    {"type": "image_generation", "output_format": "png"},
    function("view_image", path="string"),
    *(function(f"mcp__files__{name}", path="string") for name in ("read", "list", "stat")),
    {
        "type": "namespace",
        "name": "mcp__mail",
        "description": "Mail.",
        "tools": [{**function(name, query="string"), "defer_loading": True} for name in ("search", "send")],
    },
    function("spawn_agent", message="string"),
]


def test_a_first_exchange_of_codex_is_streamed_and_found_in_the_cache_when_it_comes_again(
    wide_server: ServerProcess,
) -> None:
    """And the turn after it, whose items are those that were streamed."""
    asked: dict[str, Any] = {
        "model": "tiny",
        "instructions": instructions(10_000),
        "input": [
            text("developer", "<permissions instructions>Ask before you write.</permissions instructions>"),
            text("user", "<environment_context><cwd>/src</cwd></environment_context>"),
            text("user", "Which files are there?"),
        ],
        "tools": CODEX_TOOLS,
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "0199a213-81c0-7800-8aa1-bbab2a035a53",
        "text": {"verbosity": "medium"},
        "client_metadata": {"x-codex-installation-id": "0"},
    }
    assert len(CODEX_TOOLS) == 15
    headers = {
        "authorization": f"Bearer {WIDE_KEY}",
        "originator": "codex_cli_rs",
        "session_id": "0199a213",
        "accept": "text/event-stream",
    }

    def answered(**changes: Any) -> dict[str, Any]:
        body = {**asked, **changes}
        response = httpx.post(f"{wide_server.url}/v1/responses", json=body, headers=headers, timeout=240)
        assert response.status_code == 200, response.text
        events = parsed(response.text)
        told: dict[str, Any] = events[-1]["response"]
        done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
        assert done == told["output"]
        assert told["output"][0]["content"][0]["text"]
        return told

    first = answered()
    in_force = [tool["name"] for tool in first["tools"]]
    assert len(in_force) == 11
    assert {"apply_patch", "mcp__mail"} <= {*in_force}
    num_tokens = first["usage"]["input_tokens"]
    assert num_tokens > 10_000
    second = answered()
    assert second["usage"]["input_tokens_details"]["cached_tokens"] > 0.9 * num_tokens
    assert [item["content"] for item in second["output"]] == [item["content"] for item in first["output"]]
    items = [*asked["input"], *first["output"], text("user", "And what is in them?")]
    third = answered(input=items)
    assert third["usage"]["input_tokens_details"]["cached_tokens"] > 0.9 * num_tokens
    assert json.dumps(third["output"])
