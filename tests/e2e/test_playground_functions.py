"""The playground's functions that know no page, in the browser whose JavaScript they are to run in."""

import json
from typing import Any

import httpx
import pytest

from tests.e2e.browser import Page
from tests.e2e.conftest import MODEL
from tests.e2e.playground import SENT, load
from tests.e2e.process import ServerProcess


@pytest.fixture(scope="module")
def page(browser: Page, server: ServerProcess) -> Page:
    """The page, opened once: nothing here changes it."""
    load(browser, server.url)
    return browser


def test_events_are_read_whatever_the_pieces_they_come_in(page: Page) -> None:
    text = (
        ': keep-alive\r\n\r\nevent: x\r\ndata: {"a": "é😀"}\r\n\r\ndata:two\ndata: lines\n\n\rdata\r\rid: 7\n\n'
        "data:  spaced: out\r\n\r\n: bye\n\ndata: never ended"
    )
    wanted = ['{"a": "é😀"}', "two\nlines", "", " spaced: out"]
    found = page.evaluate(
        f"""(async () => {{
          const {{ readEvents }} = await import("/playground/sse.js");
          const bytes = new TextEncoder().encode({json.dumps(text)});
          const results = [];
          for (let size = 1; size <= bytes.length; size++) {{
            const pieces = [];
            for (let begin = 0; begin < bytes.length; begin += size) pieces.push(bytes.slice(begin, begin + size));
            const body = new ReadableStream({{
              start(controller) {{
                pieces.forEach((piece) => controller.enqueue(piece));
                controller.close();
              }},
            }});
            const events = [];
            for await (const event of readEvents(body)) events.push(event);
            results.push(events);
          }}
          return results;
        }})()"""
    )
    assert len(found) == len(text.encode())
    assert all(events == wanted for events in found)


def aligned(page: Page, events: list[list[Any]]) -> Any:
    """What each token adds to the text; an event is a list of token texts and its own text."""
    return page.evaluate(
        f"""(async () => {{
          const {{ Aligner }} = await import("/playground/tokens.js");
          const aligner = new Aligner();
          const parts = [];
          for (const [names, text] of {json.dumps(events)})
            parts.push(...aligner.push(names.map((name) => ({{ name, text: "" }})), text));
          return [...parts, ...aligner.finish()].map((token) => token.text);
        }})()"""
    )


@pytest.mark.parametrize(
    ("events", "wanted"),
    [
        pytest.param([[["Hi"], "Hi"], [[" you"], " you"]], ["Hi", " you"], id="one token an event"),
        pytest.param([[["Hi", " ", "you"], "Hi you"]], ["Hi", " ", "you"], id="several tokens an event"),
        pytest.param([[[""], ""], [[""], ""], [["é"], "é"]], ["", "", "é"], id="a character in three tokens"),
        pytest.param([[["a", "", "é", "b"], "aéb"]], ["a", "", "é", "b"], id="the same in one event"),
        pytest.param([[["a"], "a"], [["<end>"], ""]], ["a", ""], id="an end that is not shown"),
        pytest.param([[["<x>"], ""], [["b"], "b"]], ["", "b"], id="a hidden token amid"),
        pytest.param([[["the", "sea"], "the sea"]], ["the", " sea"], id="dropped leading spaces"),
        pytest.param([[[" on"], " "], [["ce"], "on"], [[], "ce"]], [" on", "ce"], id="text comes late"),
        pytest.param([[[" end", "."], " en"]], [" en", ""], id="cut by a stop string"),
        pytest.param([[["\n"], "\n"], [["\n\n"], "\n\n"]], ["\n", "\n\n"], id="line ends"),
        pytest.param([[["�"], "�"], [["b"], "b"]], ["�", "b"], id="a broken character"),
        pytest.param([[["", ""], "xy"], [["z"], "z"]], ["", "xy", "z"], id="tokens without texts"),
        pytest.param([[[], "lost"]], ["lost"], id="text without tokens"),
    ],
)
def test_each_token_gets_its_part_of_the_text(page: Page, events: list[list[Any]], wanted: list[str]) -> None:
    assert aligned(page, events) == wanted


def test_characters_that_the_server_splits_over_tokens_come_out_whole(page: Page, server: ServerProcess) -> None:
    body = {
        "model": MODEL,
        **SENT,
        "messages": [{"role": "user", "content": "Hi"}],
        "structured_outputs": {"regex": "(é|ü |😀){5}"},
    }
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=120) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    chunks = [json.loads(line) for line in lines[:-1]]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    text = "".join(choice["delta"].get("content") or "" for choice in choices)
    tokens = page.evaluate(
        f"""(async () => {{
          const {{ Aligner, readTokens }} = await import("/playground/tokens.js");
          const aligner = new Aligner();
          const tokens = [];
          for (const choice of {json.dumps(choices)})
            tokens.push(...aligner.push(readTokens(choice), choice.delta.content ?? ""));
          return [...tokens, ...aligner.finish()];
        }})()"""
    )
    assert len(text.replace(" ", "")) == 5
    assert len(tokens) == chunks[-1]["usage"]["completion_tokens"] > len(text)
    assert "".join(token["text"] for token in tokens) == text
    assert all(token["text"] in ("", "é", "ü", " ", "😀") for token in tokens)


def test_weights_are_summed_up_as_they_are_meant(page: Page) -> None:
    found = page.evaluate(
        """(async () => {
          const { entropyOf, leaderOf, strengthOf, CodeFences, Means } = await import("/playground/tokens.js");
          const { visible, classesOf } = await import("/playground/marks.js");
          const means = new Means();
          for (const weights of [[1, 0], [0.5, 0.5], null]) means.add({ weights, drafted: weights?.[0] !== 1 });
          const fences = new CodeFences();
          return {
            entropies: [[1, 0], [0.5, 0.5], [1]].map(entropyOf),
            leaders: [[0.2, 0.5, 0.3], [0.4, 0.4, 0.2]].map(leaderOf),
            strengths: [[0.5, 0.5], [1, 0, 0], [0.25, 0.75], [1]].map(strengthOf),
            means: [means.weights, means.entropy, means.count, means.drafted],
            code: ["a ", "``", "`py", " x", "\\n```", "b", "`c`"].map((piece) => fences.push(piece)),
            visible: visible("a b\\n\\t\\u0000"),
            looks: new Set(Array.from({ length: 35 }, (_, index) => classesOf(index).join())).size,
          };
        })()"""
    )
    log2 = 0.6931471805599453
    assert found["entropies"] == pytest.approx([0, log2, 0])
    assert found["leaders"] == [1, 0]
    assert found["strengths"] == pytest.approx([0, 1, 0.5, 1])
    assert found["means"] == [[0.75, 0.25], pytest.approx(log2 / 2), 2, 0.5]
    assert found["code"] == [False, False, True, True, True, False, False]
    assert found["visible"] == "a␣b↵⇥␀"
    assert found["looks"] == 35


def test_speed_is_that_of_the_tokens_behind_the_first_event(page: Page) -> None:
    """Waiting for the prompt does not count, nor do events without tokens; an event may bring several at once."""
    found = page.evaluate(
        """(async () => {
          const { Pace } = await import("/playground/tokens.js");
          const pace = new Pace();
          const speeds = [];
          for (const [count, time] of [[0, 50], [1, 1000], [0, 1100], [5, 1500], [2, 2000], [0, 9000]]) {
            pace.push(count, time);
            speeds.push(pace.tokensPerSecond);
          }
          return speeds;
        })()"""
    )
    assert found == [None, None, None, 10, 7, 7]
