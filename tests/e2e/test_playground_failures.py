"""What the playground does when the server refuses, wants a key, breaks off or is gone."""

import httpx
import pytest

from tests.e2e.browser import Page
from tests.e2e.playground import ANSWERED, TOKENS, ask, bodies, chats, choose, send, text_of
from tests.e2e.process import ServerProcess

QUESTION = "Tell me about the sea."
GUARD = """(() => {
  const real = window.fetch;
  window.fetch = async (url, init) => {
    const key = new Headers(init?.headers).get("Authorization");
    if (key === "Bearer right") return real(url, init);
    const error = { message: "Missing or wrong API key.", type: "invalid_request_error", param: null, code: null };
    return new Response(JSON.stringify({ error }), { status: 401 });
  };
})()"""
"""A server that wants a key, as far as the page can tell."""


def test_a_refused_request_is_explained_and_can_be_repeated(page: Page, server: ServerProcess) -> None:
    page.evaluate("document.querySelector('[name=system]').value = 'x'.repeat(1500)")
    page.evaluate("document.querySelector('[name=max_completion_tokens]').value = 3")
    send(page, QUESTION)
    page.wait_until("document.querySelector('.failure') !== null")
    refusal = httpx.post(f"{server.url}/v1/chat/completions", json=bodies(page)[0])
    assert refusal.status_code == 400
    assert text_of(page, ".failure .detail") == refusal.json()["error"]["message"]
    page.evaluate("document.querySelector('[name=system]').value = ''")
    page.click("document.querySelector('.retry')")
    page.wait_until(ANSWERED)
    assert page.evaluate("document.querySelector('.failure') === null")
    assert page.evaluate(f"{TOKENS}.length") == 3
    assert any("400" in problem for problem in page.problems), "the browser itself notes the refusal"
    page.forget()


def test_a_value_out_of_range_is_not_sent(page: Page) -> None:
    choose(page, temperature=3)
    send(page, QUESTION)
    assert page.evaluate("document.querySelector('[name=temperature]').matches(':user-invalid, :focus')")
    assert chats(page) == []


def test_a_missing_key_is_asked_for_and_kept_in_memory_only(page: Page, server: ServerProcess) -> None:
    script = page.call("Page.addScriptToEvaluateOnNewDocument", source=GUARD)["identifier"]
    try:
        page.open(f"{server.url}/")
        page.wait_until("document.querySelector('#key-dialog').open")
        assert text_of(page, ".reason") == "Missing or wrong API key."
        page.type("wrong")
        page.press("Enter")
        page.wait_until("document.querySelector('#key-dialog').open")
        page.type("right")
        page.press("Enter")
        page.wait_until("document.querySelector('#model').textContent")
        ask(page, QUESTION, max_completion_tokens=3)
        (sent,) = chats(page)
        assert {name.lower(): value for name, value in sent["headers"].items()}["authorization"] == "Bearer right"
        assert [request["url"] for request in page.requests if "right" in request["url"]] == []
        stored = page.evaluate("[localStorage.length, sessionStorage.length, document.cookie, location.href]")
        assert stored == [0, 0, "", f"{server.url}/"]
        page.open(f"{server.url}/")
        page.wait_until("document.querySelector('#key-dialog').open")
        assert page.evaluate("document.querySelector('#key-dialog input').value") == ""
    finally:
        page.call("Page.removeScriptToEvaluateOnNewDocument", identifier=script)


def test_a_question_that_met_a_refused_key_is_asked_again_with_the_right_one(page: Page) -> None:
    page.evaluate(GUARD)
    page.click("document.querySelector('#message')")
    page.type(QUESTION)
    choose(page, max_completion_tokens=3)
    page.click("document.querySelector('#send')")
    page.wait_until("document.querySelector('#key-dialog').open")
    page.type("right")
    page.press("Enter")
    page.wait_until(ANSWERED)
    assert page.evaluate("document.querySelectorAll('.turn').length") == 1
    assert page.evaluate(f"{TOKENS}.length") == 3


@pytest.mark.parametrize(
    ("answer", "title"),
    [
        ("throw new TypeError('no network')", "The server cannot be reached."),
        ("return new Response('data: {\"choices\": []}\\n\\n')", "The answer broke off."),
        ('return new Response(\'data: {"error": {"message": "it died"}}\\n\\n\')', "The server failed to answer."),
        (
            "return new Response('<html>', {status: 503, headers: {'Retry-After': '7'}})",
            "The server has no room for this request now. Try again in 7 s.",
        ),
    ],
)
def test_whatever_happens_to_a_request_is_said_in_plain_words(page: Page, answer: str, title: str) -> None:
    page.evaluate(f"void (window.fetch = async () => {{ {answer} }})")
    send(page, QUESTION)
    page.wait_until("document.querySelector('.failure') !== null")
    assert text_of(page, ".failure strong") == title
    assert not page.evaluate("document.querySelector('#send').hidden")
