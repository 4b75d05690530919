"""Clients of the end-to-end tests that do what no official client does."""

import json
import threading
from collections.abc import Mapping
from typing import Any

import httpx

from tests.e2e.process import wait_for


class Listener(threading.Thread):
    """A client that reads a stream of so many tokens to its end."""

    def __init__(self, url: str, max_tokens: int, headers: Mapping[str, str] | None = None, **fields: Any) -> None:
        """Begins to read, and waits until the stream has begun; `fields` add to the request."""
        super().__init__()
        self._url = f"{url}/v1/chat/completions"
        self._headers = dict(headers or {})
        self._body: dict[str, Any] = {
            "messages": [{"role": "user", "content": "Go on."}],
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "stream": True,
            **fields,
        }
        self.events: list[str] = []
        self.comments: list[str] = []
        self.error: Exception | None = None
        self.start()
        wait_for(lambda: len(self.events) > 2, "the stream has begun")

    def run(self) -> None:
        """Read."""
        try:
            with httpx.stream("POST", self._url, json=self._body, headers=self._headers, timeout=60) as response:
                for line in filter(None, response.iter_lines()):
                    (self.events if line.startswith("data: ") else self.comments).append(line.removeprefix("data: "))
        except httpx.HTTPError as error:
            self.error = error

    def text(self) -> str:
        """What the stream said."""
        chunks = [json.loads(event) for event in self.events if event != "[DONE]"]
        return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])

    def last_error(self) -> str:
        """The code of the error that ended the stream."""
        self.join(60)
        error, done = self.events[-2:]
        assert done == "[DONE]"
        return str(json.loads(error)["error"]["code"])
