"""A thinking model on a real server: budgets, forms and calls behind a thought, streamed and whole."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.e2e.asking import ask, events
from tests.e2e.conftest import NO_SPACES
from tests.e2e.process import ServerProcess
from tests.fakes import write_tiny_fusion
from tests.server.serving.test_thoughts import LEAVES, MARKERS, OPENS, OTHER

BUDGET = 6
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["n"]}


def written(folder: Path, *templates: str) -> Path:
    """A tiny fusion with these templates."""
    folder.mkdir(parents=True)
    for number, text in enumerate(templates):
        (folder / f"{number}.jinja").write_text(text)
    return write_tiny_fusion(folder, templates=[f"./{index}.jinja" for index in range(3)], markers=MARKERS)


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server whose models think."""
    folder = tmp_path_factory.mktemp("thinking")
    options = ["--reasoning-parser", "qwen3", "--tool-call-parser", "hermes"]
    options += ["--structured-outputs-config", NO_SPACES]
    server = ServerProcess(written(folder / "fusion", OPENS, OTHER, OPENS), folder / "log", *options)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.kill()


def asked(**fields: Any) -> dict[str, Any]:
    """A body."""
    return {"messages": [{"role": "user", "content": "Count."}], "temperature": 0, "max_tokens": 60, **fields}


def test_an_answer_in_a_form_follows_the_thought_whole_and_streamed(thinking: ServerProcess) -> None:
    body = asked(
        thinking_token_budget=BUDGET,
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}},
        gate_weights=True,
    )
    whole = ask(thinking, body)
    (choice,) = whole["choices"]
    assert json.loads(choice["message"]["content"])["n"] in range(10)
    assert 0 < whole["usage"]["completion_tokens_details"]["reasoning_tokens"] <= BUDGET
    assert len(choice["gate_weights"]["content"]) == whole["usage"]["completion_tokens"]
    choices = [choice for event in events(thinking, body | {"stream": True}) for choice in event["choices"]]
    for name in ("reasoning", "reasoning_content", "content"):
        told = "".join(choice["delta"].get(name) or "" for choice in choices)
        assert told == choice["message"][name]
    closed = ask(thinking, body | {"reasoning_effort": "none"})["choices"][0]["message"]
    assert closed.get("reasoning") is None
    assert json.loads(closed["content"])["n"] in range(10)


def test_a_demanded_call_follows_the_thought(thinking: ServerProcess) -> None:
    tool = {"type": "function", "function": {"name": "count", "parameters": SCHEMA}}
    body = asked(
        max_tokens=200,
        tools=[tool],
        tool_choice={"type": "function", "function": {"name": "count"}},
        thinking={"type": "enabled", "budget_tokens": BUDGET},
    )
    (choice,) = ask(thinking, body)["choices"]
    message = choice["message"]
    assert message.get("tool_calls"), choice
    assert message["reasoning"], message
    assert json.loads(message["tool_calls"][0]["function"]["arguments"])["n"] in range(10)


def test_the_official_client_reads_thoughts(thinking: ServerProcess) -> None:
    with openai.OpenAI(base_url=f"{thinking.url}/v1", api_key="unused", max_retries=0) as client:
        completion = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "Count."}],
            temperature=0,
            max_tokens=20,
            extra_body={"thinking_token_budget": BUDGET},
        )
    message: Any = completion.choices[0].message
    assert message.reasoning == message.reasoning_content
    assert completion.usage is not None
    details = completion.usage.completion_tokens_details
    assert details is not None
    assert details.reasoning_tokens is not None
    assert 0 < details.reasoning_tokens <= BUDGET


@pytest.mark.long
def test_specialists_that_disagree_end_the_start(tmp_path: Path) -> None:
    server = ServerProcess(
        written(tmp_path / "fusion", OPENS, LEAVES, OPENS), tmp_path / "log", "--reasoning-parser", "qwen3"
    )
    try:
        assert server.process.wait(timeout=120) == 2
        assert "the prompt of specialist text opens a thought, that of code does not" in server.log
        assert "Traceback" not in server.log
    finally:
        server.kill()
