"""The playground in a real Chromium on a real server: a place for every token, the API's numbers, plain text."""

import json
import math
import re

import pytest

from tests.e2e.browser import Page
from tests.e2e.conftest import MODEL
from tests.e2e.playground import ANSWERED, SENT, TOKENS, ask, bodies, export, load, received, send, text_of
from tests.e2e.process import ServerProcess, wait_for

NAMES = ["text", "code", "math"]
QUESTION = "Tell me about the sea."
HOSTILE = '<img src=x onerror="hacked=1"><script>hacked=2</script><b>bold</b>'
RUNNING = "vllm:num_requests_running{"
RECORDED_ANNOUNCEMENTS = """
window.announced = [];
new MutationObserver(() => announced.push(document.querySelector('#status').textContent))
  .observe(document.querySelector('#status'), {childList: true, characterData: true, subtree: true});
"""


def test_an_answer_has_a_place_for_every_token_with_the_apis_numbers(page: Page) -> None:
    ask(page, QUESTION, temperature=0, max_completion_tokens=24)
    (sent,) = bodies(page)
    messages = [{"role": "user", "content": QUESTION}]
    assert sent == {"model": MODEL, **SENT, "temperature": 0, "max_completion_tokens": 24, "messages": messages}
    events = received(page)
    choices = [choice for event in events for choice in event["choices"]]
    rows = [row for choice in choices for row in choice.get("gate_weights", {}).get("content", [])]
    ids = [token_id for choice in choices for token_id in choice.get("token_ids") or []]
    logprobs = [entry for choice in choices if choice.get("logprobs") for entry in choice["logprobs"]["content"]]
    text = "".join(choice["delta"].get("content") or "" for choice in choices)
    usage = events[-1]["usage"]
    assert page.evaluate(f"{TOKENS}.length") == usage["completion_tokens"] == len(rows) == len(ids) == len(logprobs)
    assert text_of(page, ".answer") == text
    for index in (0, 7, len(rows) - 1):
        page.point_at(f"{TOKENS}[{index}]")
        page.wait_until(f"{TOKENS}[{index}].getAttribute('aria-describedby') === 'card'")
        shown = page.evaluate("[...document.querySelectorAll('#card .card-weights li')].map(row => row.textContent)")
        assert shown == [f"{name}{weight:.3f}" for name, weight in zip(NAMES, rows[index], strict=True)]
        assert f"token {ids[index]}" in text_of(page, ".card-head")
        likeliest = page.evaluate("[...document.querySelectorAll('#card .card-top .number')].map(e => e.textContent)")
        top = logprobs[index]["top_logprobs"]
        assert likeliest == [f"{100 * math.exp(entry['logprob']):.1f} %" for entry in top]
    means = [sum(own) / len(own) for own in zip(*rows, strict=True)]
    assert means == pytest.approx(choices[-1]["gate_weights"]["mean"], abs=1e-6)
    panel = page.evaluate("[...document.querySelectorAll('#specialists .number')].map(e => e.textContent)")
    assert panel == [f"{mean:.3f}" for mean in means]
    assert text_of(page, "#num-tokens") == str(len(rows))
    drafted = [mark for choice in choices for mark in choice.get("drafted", {}).get("content", [])]
    assert page.evaluate(f"[...{TOKENS}].map(token => token.classList.contains('drafted'))") == drafted
    assert page.evaluate("document.querySelector('#drafted').hidden") == (not any(drafted))

    saved = export(page)
    (turn,) = saved["turns"]
    assert (saved["model"], saved["specialists"]) == (MODEL, NAMES)
    assert (turn["question"], turn["answer"], turn["usage"]) == (QUESTION, text, usage)
    assert turn["finish_reason"] == choices[-1]["finish_reason"]
    assert turn["mean"] == pytest.approx(means)
    assert "".join(token["text"] for token in turn["tokens"]) == text
    found = [(token["token_id"], token["gate_weights"], token["token"], token["logprob"]) for token in turn["tokens"]]
    entries = [(entry["token"], entry["logprob"]) for entry in logprobs]
    assert found == [(own, row, *entry) for own, row, entry in zip(ids, rows, entries, strict=True)]


def test_a_conversation_goes_on_until_a_new_chat(page: Page) -> None:
    ask(page, QUESTION, max_completion_tokens=5, system="Be brief.", seed=1)
    first = text_of(page, ".answer")
    ask(page, "And the sky?")
    assert bodies(page)[-1]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "And the sky?"},
    ]
    page.click("document.querySelector('#new')")
    assert page.evaluate(f"{TOKENS}.length") == 0
    page.click("document.querySelector('.example')")
    page.wait_until(ANSWERED)
    assert [message["role"] for message in bodies(page)[-1]["messages"]] == ["system", "user"]


def test_stop_ends_the_request_on_the_server(page: Page, server: ServerProcess) -> None:
    def is_stopped_in_time() -> bool:
        page.click("document.querySelector('#new')")
        send(page, "Go on for ever.")
        page.wait_until(f"{TOKENS}.length > 3")
        page.evaluate("document.querySelector('#stop').click()")  # it may be hidden again, out of a mouse's reach
        page.wait_until(ANSWERED)
        wait_for(lambda: server.metric(RUNNING) == 0, "no request is running")
        return "stopped by you" in text_of(page, ".facts") and page.evaluate(f"{TOKENS}.length") < 700

    # On a loaded machine the answer may be complete before the click.
    wait_for(is_stopped_in_time, "the answer is stopped early", 90)
    assert page.evaluate("document.querySelector('#stop').hidden && !document.querySelector('#send').hidden")


def test_whatever_is_written_stays_text(page: Page) -> None:
    ask(page, HOSTILE, system=HOSTILE, max_completion_tokens=4)
    assert text_of(page, ".question") == HOSTILE
    page.evaluate(
        f"""(async () => {{
          const {{ TurnView }} = await import("/playground/answer.js");
          const {{ TokenCard }} = await import("/playground/card.js");
          const {{ Turn }} = await import("/playground/conversation.js");
          const names = [{json.dumps(HOSTILE)}, "b"];
          const card = new TokenCard(document.querySelector("#card"));
          const turn = new Turn("hostile");
          const view = new TurnView(turn, 1, card, () => names);
          document.querySelector("#log").append(view.root);
          const text = {json.dumps(HOSTILE)};
          const top = [{{ text, logprob: -1 }}];
          const token = {{ text, name: text, id: 1, weights: [0.25, 0.75], drafted: true, logprob: -1, top }};
          turn.add(token);
          view.add(token);
          turn.error = {{ title: text, detail: text }};
          view.end(() => {{}});
          view.answer.firstChild.focus();
        }})()"""
    )
    assert page.evaluate("[...document.querySelectorAll('.token')].at(-1).textContent") == HOSTILE
    assert HOSTILE in text_of(page, "#card")
    assert text_of(page, ".failure strong") == HOSTILE
    assert page.evaluate("document.querySelectorAll('#log img, #log script, #log b, #card img').length") == 0
    assert page.evaluate("typeof hacked") == "undefined"


def test_five_specialists_are_told_apart_by_colour_and_by_underline(page: Page) -> None:
    shown = page.evaluate(
        """(async () => {
          const { TurnView } = await import("/playground/answer.js");
          const { TokenCard } = await import("/playground/card.js");
          const { Turn } = await import("/playground/conversation.js");
          const { MixPanel } = await import("/playground/mix.js");
          const names = ["text", "code", "math", "law", "art"];
          const mix = new MixPanel(document);
          mix.name(names);
          const turn = new Turn("five");
          const view = new TurnView(turn, 1, new TokenCard(document.querySelector("#card")), () => names);
          document.querySelector("#log").append(view.root);
          for (const lead of [0.92, 0.4]) names.forEach((name, index) => {
            const weights = names.map((_, own) => own === index ? lead : (1 - lead) / 4);
            const token = { text: ` ${name}`, name, id: 1, weights, drafted: false, logprob: -1, top: [] };
            turn.add(token);
            view.add(token);
          });
          view.end(() => {});
          mix.show(turn);
          const lookOf = (s) => [s.backgroundColor, s.textDecorationStyle, s.textDecorationColor];
          const look = (part) => lookOf(getComputedStyle(part));
          const legend = [...document.querySelectorAll("#specialists li")];
          const rows = legend.map((row) => [...row.children].map((part) => part.textContent));
          const bars = legend.map((row) => getComputedStyle(row.querySelector(".filled")).backgroundColor);
          const tags = legend.map((row) => look(row.querySelector(".name-tag"))[1]);
          return { rows, bars, tags, tokens: [...view.answer.querySelectorAll(".token")].map(look) };
        })()"""
    )
    lines = ["solid", "dashed", "dotted", "double", "wavy"]
    assert shown["rows"] == [[name, "0.200", ""] for name in [*NAMES, "law", "art"]]
    assert shown["tags"] == lines
    assert len(set(shown["bars"])) == 5
    colours, styles, underlines = zip(*shown["tokens"], strict=True)
    assert list(styles) == lines * 2
    assert len(set(colours)) == len(set(underlines)) == 10


def test_arrow_keys_walk_over_tokens_and_each_is_described(page: Page) -> None:
    ask(page, QUESTION, temperature=0, max_completion_tokens=60)
    num_tokens = page.evaluate(f"{TOKENS}.length")
    focused = f"[...{TOKENS}].indexOf(document.activeElement)"
    page.evaluate(f"{TOKENS}[0].focus()")
    assert page.evaluate(focused) == 0
    for keys, place in ((["ArrowRight"] * 3, 3), (["ArrowLeft"], 2), (["End"], num_tokens - 1), (["Home"], 0)):
        page.press(*keys)
        assert page.evaluate(focused) == place
        assert page.evaluate("document.activeElement.getAttribute('aria-describedby')") == "card"
        assert page.evaluate("document.querySelectorAll('.answer [tabindex=\"0\"]').length") == 1
    page.press("Escape")
    assert page.evaluate("document.querySelector('#card').hidden")
    page.resize(360, 860)
    page.press("ArrowDown")
    below = page.evaluate(focused)
    lines = f"[{TOKENS}[0], {TOKENS}[{below}]].map(e => e.getBoundingClientRect().top)"
    first, second = page.evaluate(lines)
    assert second > first
    page.press("ArrowUp")
    assert page.evaluate(focused) == 0


def test_a_screen_reader_hears_the_beginning_and_the_end_only(page: Page) -> None:
    page.evaluate(RECORDED_ANNOUNCEMENTS)
    ask(page, QUESTION, temperature=0, max_completion_tokens=20)
    begun, ended = page.evaluate("announced")
    assert begun == "Answering."
    assert re.match(r"Answer complete: \d+ tokens\. Mean weights: text \d\.\d\d, code ", ended)
    assert page.evaluate("document.querySelector('#log').getAttribute('aria-live')") == "off"
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    named = {"button", "textbox", "spinbutton", "log", "heading"}
    unnamed = [n for n in nodes if n["role"]["value"] in named and not n["ignored"] and not n["name"]["value"]]
    assert unnamed == []


def test_a_phone_shows_all_of_it_and_a_tap_shows_the_numbers(page: Page, server: ServerProcess) -> None:
    page.resize(360, 740)
    load(page, server.url)
    page.click("document.querySelector('#settings summary')")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    ask(page, f"{'long' * 60} words", temperature=0, max_completion_tokens=60)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.tap(f"{TOKENS}[30]")
    page.wait_until("!document.querySelector('#card').hidden")
    left, right, top, bottom = page.evaluate(
        "(b => [b.left, b.right, b.top, b.bottom])(document.querySelector('#card').getBoundingClientRect())"
    )
    assert left >= 0
    assert right <= 360
    assert top >= 0
    assert bottom <= 740


def test_the_look_follows_the_users_preferences(page: Page) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(paper)
    duration = "getComputedStyle(document.querySelector('.mix .filled')).transitionDuration"
    assert page.evaluate(duration) == "0.15s"
    page.prefer(prefers_color_scheme="dark", prefers_reduced_motion="reduce")
    assert page.evaluate(paper) != light
    assert page.evaluate(duration) == "0s"
