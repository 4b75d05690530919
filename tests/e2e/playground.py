"""The playground's page as a user works it, and what it has sent; knows the page's elements, starts nothing."""

import json
from typing import Any

from tests.e2e.browser import Page
from tests.e2e.process import wait_for

SENT = {
    "gate_weights": True,
    "drafted": True,
    "logprobs": True,
    "top_logprobs": 5,
    "return_token_ids": True,
    "stream": True,
    "stream_options": {"include_usage": True},
}
"""What the page asks for beside messages and sampling."""

TOKENS = "document.querySelectorAll('.token')"
ANSWERED = "document.querySelectorAll('.facts').length"
ANSWER_SECONDS = 120.0


_TAP = """(() => {
    const ask = window.fetch;
    window.received = [];
    window.fetch = async (...request) => {
        const response = await ask(...request);
        window.received.push(response.clone().text().catch(() => ""));
        return response;
    };
})()"""
"""A copy of every answer: the browser's own tools lose one whose reader leaves after the last event."""


def load(page: Page, url: str) -> None:
    """Open the page and wait until it knows the model."""
    page.open(f"{url}/")
    page.wait_until("document.querySelector('#model').textContent")
    page.evaluate(_TAP)


def choose(page: Page, **fields: Any) -> None:
    """Fill controls in."""
    for name, value in fields.items():
        page.click(f"document.querySelector('[name={name}]')")
        page.evaluate(f"document.querySelector('[name={name}]').select()")
        page.type(str(value))


def send(page: Page, question: str) -> None:
    """Type a question and press Enter."""
    page.click("document.querySelector('#message')")
    page.type(question)
    page.press("Enter")


def ask(page: Page, question: str, **fields: Any) -> None:
    """Fill controls in, ask, and wait for the end of the answer."""
    num_before = page.evaluate(ANSWERED)
    choose(page, **fields)
    send(page, question)
    page.wait_until(f"{ANSWERED} > {num_before}", ANSWER_SECONDS)


def text_of(page: Page, selector: str) -> Any:
    """Text of the first element that a selector finds."""
    return page.evaluate(f"document.querySelector({json.dumps(selector)}).textContent")


def chats(page: Page) -> list[Any]:
    """Chat requests that the page has sent, as the browser describes a request."""
    return [request for request in page.requests if request["url"].endswith("/v1/chat/completions")]


def bodies(page: Page) -> list[Any]:
    """Their bodies."""
    return [json.loads(request["postData"]) for request in chats(page)]


def received(page: Page) -> list[Any]:
    """The events of the latest answer, as they came over the wire."""
    body = page.evaluate("window.received.at(-1)")
    lines = [line.removeprefix("data: ") for line in body.splitlines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def export(page: Page) -> Any:
    """What the export button saves."""
    for former in page.downloads.glob("*"):
        former.unlink()
    page.click("document.querySelector('#export')")

    def content() -> Any:
        try:
            return [json.loads(path.read_text()) for path in page.downloads.glob("*.json")]
        except json.JSONDecodeError:
            return None

    (saved,) = wait_for(content, "the export is saved")
    return saved
