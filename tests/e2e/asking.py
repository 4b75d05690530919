"""Generation requests over plain HTTP: whole answers, and the events of streamed ones. Knows no field."""

import json
from typing import Any

import httpx

from tests.e2e.process import ServerProcess


def ask(server: ServerProcess, body: dict[str, Any], path: str = "chat/completions") -> Any:
    """The whole answer to a request that is let in."""
    response = httpx.post(f"{server.url}/v1/{path}", json=body, timeout=120)
    assert response.status_code == 200, response.text
    return response.json()


def events(server: ServerProcess, body: dict[str, Any], path: str = "chat/completions") -> list[Any]:
    """The events of its stream."""
    with httpx.stream("POST", f"{server.url}/v1/{path}", json={**body, "stream": True}, timeout=120) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]
