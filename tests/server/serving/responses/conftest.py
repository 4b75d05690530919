"""The app with a tool call parser, asked for responses."""

import json
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any

import httpx
import pytest

from tests.response_events import parsed
from ultrafuser.server.requests.grammar_worker import Trial
from ultrafuser.server.requests.grammars import GrammarCheck
from ultrafuser.server.serving.constraints import leading_vocabulary
from ultrafuser.server.settings import ServerSettings

Asking = Callable[..., Awaitable[Any]]


@pytest.fixture
def settings() -> ServerSettings:
    """With a parser that reads calls."""
    return ServerSettings(tool_call_parser="hermes")


@pytest.fixture(scope="session")
def trial(vllm_config: Any) -> Trial:
    """What tries constraints out, in this process: one of its own takes seconds to start, for every test."""
    return Trial(**asdict(leading_vocabulary(vllm_config)))


@pytest.fixture(autouse=True)
def _tried_here(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    async def verdict(_check: GrammarCheck, line: bytes, _digest: bytes) -> str | None:
        return trial.verdict(**json.loads(line))

    monkeypatch.setattr(GrammarCheck, "_try", verdict)


@pytest.fixture
def ask(client: httpx.AsyncClient) -> Asking:
    """Ask for a whole response."""

    async def ask(**body: Any) -> Any:
        response = await client.post("/v1/responses", json={"input": "Hi", **body})
        assert response.status_code == 200, response.text
        return response.json()

    return ask


@pytest.fixture
def events(client: httpx.AsyncClient) -> Asking:
    """Ask for a stream: its events, whose names are their types."""

    async def events(**body: Any) -> list[dict[str, Any]]:
        response = await client.post("/v1/responses", json={"input": "Hi", **body, "stream": True})
        assert response.status_code == 200, response.text
        return parsed(response.text)

    return events


@pytest.fixture
def refusal(client: httpx.AsyncClient) -> Asking:
    """Ask for what is refused: the error's field and message."""

    async def refusal(**body: Any) -> tuple[str | None, str]:
        response = await client.post("/v1/responses", json={"input": "Hi", **body})
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        return error["param"], error["message"]

    return refusal
