"""Every field of vLLM's request models works on the fused distribution or is refused by name; none is undecided."""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import httpx
import pytest
from pydantic import BaseModel
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest

from tests.e2e.conftest import MODEL
from tests.e2e.process import ServerProcess
from tests.fakes import EOS_ID
from ultrafuser.server.requests.unsupported import CHAT_REFUSALS, COMPLETION_REFUSALS

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
PROMPTS: Mapping[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "Name three colours."}]},
    TEXT: {"prompt": "Name three colours."},
}
LETTERS = list(range(70, 80))
END = {str(EOS_ID): 100}
LONG = "Tell me a long story about a lighthouse, a ship and a whale. " * 3
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "paint",
        "description": "Paint the wall",
        "parameters": {
            "type": "object",
            "properties": {"colour": {"enum": ["red", "blue"]}},
            "required": ["colour"],
            "additionalProperties": False,
        },
    },
}
WRITTEN = '<tool_call>\n{"name": "paint", "arguments": {"colour": "red"}}\n</tool_call>'
ENOUGH: dict[str, Any] = {"max_tokens": 200, "ignore_eos": False}
CONTINUED: dict[str, Any] = {
    "messages": [*PROMPTS[CHAT]["messages"], {"role": "assistant", "content": "Green"}],
    "continue_final_message": True,
    "add_generation_prompt": False,
    "return_token_ids": False,
}


class Asking:
    """Asks one route for 12 greedy tokens, unless the fields say otherwise."""

    def __init__(self, server: ServerProcess, route: str) -> None:
        self.url, self.route = server.url + route, route
        self.fields = PROMPTS[route] | {
            "temperature": 0,
            "max_tokens": 12,
            "ignore_eos": True,
            "return_token_ids": True,
        }

    def __call__(self, **fields: Any) -> Any:
        """The response's body."""
        response = httpx.post(self.url, json=self.fields | fields, timeout=60)
        assert response.status_code == 200, response.text
        return response.json()

    def stream(self, **fields: Any) -> list[Any]:
        """The bodies of a stream's events."""
        response = httpx.post(self.url, json=self.fields | {"stream": True} | fields, timeout=60)
        assert response.headers["content-type"].startswith("text/event-stream"), response.text
        *events, last = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
        assert last == "[DONE]"
        return [json.loads(event) for event in events]

    def with_text(self, text: str, **fields: Any) -> Any:
        """The response to another prompt."""
        prompt = {"prompt": text} if self.route == TEXT else {"messages": [{"role": "user", "content": text}]}
        return self(**prompt, **fields)


def ids(body: Any) -> list[int]:
    """Token ids of the first choice."""
    found: list[int] = body["choices"][0]["token_ids"]
    return found


def text(body: Any) -> str:
    """Text of the first choice."""
    choice = body["choices"][0]
    return choice["text"] if "text" in choice else choice["message"]["content"]


def reason(body: Any) -> str:
    """Why the first choice ended."""
    return str(body["choices"][0]["finish_reason"])


def used(body: Any) -> int:
    """How many tokens were generated."""
    return int(body["usage"]["completion_tokens"])


def cached(body: Any) -> int:
    """How many tokens of the prompt were in the cache."""
    return int((body["usage"]["prompt_tokens_details"] or {}).get("cached_tokens") or 0)


def delta(chunk: Any) -> str:
    """Text of an event."""
    return "".join(choice.get("text", choice.get("delta", {}).get("content")) or "" for choice in chunk["choices"])


def commonest(body: Any) -> int:
    """How often the most frequent token occurs."""
    return Counter(ids(body)).most_common(1)[0][1]


def of_letters(ask: Asking, **fields: Any) -> Any:
    """A longer response of ten tokens only."""
    return ask(allowed_token_ids=LETTERS, max_tokens=40, **fields)


def top_tokens(ask: Asking, **fields: Any) -> list[str]:
    """The alternatives to the first token."""
    logprobs = ask(logprobs=True if ask.route == CHAT else 2, **fields)["choices"][0]["logprobs"]
    if ask.route == CHAT:
        return [entry["token"] for entry in logprobs["content"][0]["top_logprobs"]]
    return list(logprobs["top_logprobs"][0])


def stop_works(ask: Asking) -> bool:
    whole = text(ask())
    short = ask(stop=[whole[5:7]])
    return (text(short), reason(short)) == (whole[: whole.index(whole[5:7])], "stop")


def stop_token_works(ask: Asking) -> bool:
    whole = ids(ask())
    short = ask(stop_token_ids=[whole[3]])
    return (ids(short), reason(short)) == (whole[: whole.index(whole[3]) + 1], "stop")


def bad_word_works(ask: Asking) -> bool:
    first = ids(ask())[0]
    word = httpx.post(ask.url.replace(ask.route, "/detokenize"), json={"tokens": [first]}).json()["prompt"]
    return first not in ids(ask(bad_words=[word]))


def usage_works(ask: Asking) -> bool:
    last = ask.stream(stream_options={"include_usage": True})[-1]
    each = ask.stream(stream_options={"include_usage": True, "continuous_usage_stats": True})
    counts = [chunk["usage"]["completion_tokens"] for chunk in each]
    none = [chunk for chunk in ask.stream() if chunk.get("usage")]
    return last["choices"] == [] and last["usage"]["completion_tokens"] == 12 == counts[-1] == max(counts) and not none


def salt_works(ask: Asking) -> bool:
    salted = [cached(ask.with_text(LONG + ask.route, cache_salt=salt)) for salt in ("one", "one", "two")]
    return salted[0] == 0 and salted[1] > 0 and salted[2] == 0


Check = Callable[[Asking], bool]
BOTH: dict[str, Check] = {
    "model": lambda ask: ask(model=MODEL)["model"] == ask()["model"] == MODEL,
    "temperature": lambda ask: ids(ask(temperature=2, seed=1)) != ids(ask()),
    "top_p": lambda ask: ids(ask(temperature=2, top_p=1e-6)) == ids(ask()),
    "top_k": lambda ask: ids(ask(temperature=2, top_k=1)) == ids(ask()),
    "min_p": lambda ask: ids(ask(temperature=2, min_p=1)) == ids(ask()),
    "seed": lambda ask: (
        ids(ask(temperature=2, seed=5)) == ids(ask(temperature=2, seed=5)) != ids(ask(temperature=2, seed=6))
    ),
    "n": lambda ask: [choice["index"] for choice in ask(n=3, temperature=1)["choices"]] == [0, 1, 2],
    "max_tokens": lambda ask: (used(ask(max_tokens=3)), reason(ask(max_tokens=3))) == (3, "length"),
    "min_tokens": lambda ask: used(ask(ignore_eos=False, logit_bias=END, min_tokens=4)) == 5,
    "ignore_eos": lambda ask: used(ask(logit_bias=END)) == 12 and used(ask(logit_bias=END, ignore_eos=False)) == 1,
    "stop": stop_works,
    "include_stop_str_in_output": lambda ask: text(
        ask(stop=[text(ask())[5:7]], include_stop_str_in_output=True)
    ).endswith(text(ask())[5:7]),
    "stop_token_ids": stop_token_works,
    "logit_bias": lambda ask: set(ids(ask(logit_bias={"70": 100}))) == {70},
    "allowed_token_ids": lambda ask: set(ids(of_letters(ask))) <= set(LETTERS),
    "bad_words": bad_word_works,
    "frequency_penalty": lambda ask: (
        commonest(of_letters(ask, frequency_penalty=2)) < commonest(of_letters(ask, frequency_penalty=-2))
    ),
    "presence_penalty": lambda ask: (
        ids(of_letters(ask, presence_penalty=2)) != ids(of_letters(ask, presence_penalty=-2))
    ),
    "repetition_penalty": lambda ask: commonest(of_letters(ask, repetition_penalty=2)) < commonest(of_letters(ask)),
    "repetition_detection": lambda ask: (
        used(ask(logit_bias={"70": 100}, repetition_detection={"max_pattern_size": 1, "min_count": 4})) < 12
    ),
    "skip_special_tokens": lambda ask: (
        text(ask(logit_bias=END)) == "" and "<|im_end|>" in text(ask(logit_bias=END, skip_special_tokens=False))
    ),
    "spaces_between_special_tokens": lambda ask: (
        " " not in text(ask(logit_bias=END, skip_special_tokens=False, spaces_between_special_tokens=False))
    ),
    "logprobs": lambda ask: math_sums(ask),
    "logprob_token_ids": lambda ask: {"B", "C"} <= set(top_tokens(ask, logprob_token_ids=[70, 71])),
    "return_tokens_as_token_ids": lambda ask: all(
        token.startswith("token_id:")
        for token in top_tokens(
            ask, return_tokens_as_token_ids=True, **({"top_logprobs": 2} if ask.route == CHAT else {})
        )
    ),
    "return_token_ids": lambda ask: len(ids(ask())) == 12 and "token_ids" not in drop_none(ask(return_token_ids=False)),
    "stream": lambda ask: "".join(map(delta, ask.stream())) == text(ask()),
    "stream_options": usage_works,
    "stream_interval": lambda ask: (
        sum(map(bool, map(delta, ask.stream(stream_interval=6)))) < sum(map(bool, map(delta, ask.stream())))
    ),
    "response_format": lambda ask: isinstance(
        json.loads(text(ask(response_format={"type": "json_object"}, logit_bias=END, ignore_eos=False))), dict
    ),
    "structured_outputs": lambda ask: (
        text(ask(structured_outputs={"choice": ["red", "blue"]}, ignore_eos=False)) in ("red", "blue")
    ),
    "cache_salt": salt_works,
    "vllm_xargs": lambda ask: ids(ask(vllm_xargs={"mine": 1})) == ids(ask()),
    "user": lambda ask: ids(ask(user="somebody")) == ids(ask()),
    "session_id": lambda ask: ids(ask(session_id="session")) == ids(ask()),
    "priority": lambda ask: ids(ask(priority=0)) == ids(ask()),
    "add_special_tokens": lambda ask: ids(ask(add_special_tokens=True)) == ids(ask()),  # this tokenizer has none
}
CHAT_ONLY: dict[str, Check] = {
    "messages": lambda ask: ids(ask.with_text("Name one.")) != ids(ask()),
    "max_completion_tokens": lambda ask: used(ask(max_completion_tokens=3)) == 3,
    "top_logprobs": lambda ask: len(top_tokens(ask, top_logprobs=5)) == 5,
    "tools": lambda ask: prompt_tokens(ask(tools=[TOOL], tool_choice="auto")) > prompt_tokens(ask()),
    "tool_choice": lambda ask: called(ask(tools=[TOOL], tool_choice="required", logit_bias=END, **ENOUGH)) == ["paint"],
    "parallel_tool_calls": lambda ask: (
        called(ask(tools=[TOOL], structured_outputs={"choice": [WRITTEN * 2]}, parallel_tool_calls=False, **ENOUGH))
        == ["paint"]
    ),
    "reasoning_effort": lambda ask: ids(ask(reasoning_effort="low")) == ids(ask()),
    "include_reasoning": lambda ask: ask(include_reasoning=False, logprobs=True)["choices"][0]["logprobs"] is not None,
    "echo": lambda ask: text(ask(echo=True, **CONTINUED)).startswith("Green"),
    "add_generation_prompt": lambda ask: prompt_tokens(ask(add_generation_prompt=False)) < prompt_tokens(ask()),
    "continue_final_message": lambda ask: ask(return_prompt_text=True, **CONTINUED)["prompt_text"].endswith("Green"),
    "chat_template_kwargs": lambda ask: ids(ask(chat_template_kwargs={"enable_thinking": False})) == ids(ask()),
    "return_prompt_text": lambda ask: "three colours" in ask(return_prompt_text=True)["prompt_text"],
}
TEXT_ONLY: dict[str, Check] = {
    "prompt": lambda ask: ids(ask.with_text("Name one.")) != ids(ask()),
    "echo": lambda ask: text(ask(echo=True, return_token_ids=False)) == "Name three colours." + text(ask()),
    "prompt_logprobs": lambda ask: len(ask(prompt_logprobs=1)["choices"][0]["prompt_logprobs"]) > 10,
    "truncate_prompt_tokens": lambda ask: prompt_tokens(ask(truncate_prompt_tokens=2)) == 2,
    "truncation_side": lambda ask: (
        ask(truncate_prompt_tokens=2, truncation_side="right")["choices"][0]["prompt_token_ids"]
        == ask()["choices"][0]["prompt_token_ids"][:2]
    ),
}
WORKS = {CHAT: BOTH | CHAT_ONLY, TEXT: BOTH | TEXT_ONLY}
MODELS: dict[str, type[BaseModel]] = {CHAT: ChatCompletionRequest, TEXT: CompletionRequest}
REFUSALS = {CHAT: CHAT_REFUSALS, TEXT: COMPLETION_REFUSALS}


def prompt_tokens(body: Any) -> int:
    """Length of the prompt."""
    return int(body["usage"]["prompt_tokens"])


def called(body: Any) -> list[str]:
    """Names of the functions that the first choice calls."""
    return [call["function"]["name"] for call in body["choices"][0]["message"].get("tool_calls") or ()]


def drop_none(body: Any) -> dict[str, Any]:
    """The first choice without its empty fields."""
    return {name: value for name, value in body["choices"][0].items() if value is not None}


def math_sums(ask: Asking) -> bool:
    """Every token of the response has its log probability, none above zero."""
    logprobs = ask(logprobs=True if ask.route == CHAT else 0)["choices"][0]["logprobs"]
    found = [e["logprob"] for e in logprobs["content"]] if ask.route == CHAT else logprobs["token_logprobs"]
    return len(found) == 12 and max(found) <= 0


WITH_A_PARSER = {"thinking_token_budget"}
"""Fields that this server refuses: tests/e2e/test_thinking.py."""


@pytest.mark.parametrize(("route", "field"), [(route, field) for route, works in WORKS.items() for field in works])
def test_the_field_works(server: ServerProcess, route: str, field: str) -> None:
    assert WORKS[route][field](Asking(server, route))


@pytest.mark.parametrize("route", MODELS)
def test_every_field_of_vllms_model_is_decided(route: str) -> None:
    """A new release of vLLM with a new field fails here, until it is known to work or refused."""
    refused = {refusal.param for refusal in REFUSALS[route]}
    fields = set(MODELS[route].model_fields)
    assert fields - WORKS[route].keys() - refused - WITH_A_PARSER == set()
    assert WORKS[route].keys() - fields == set()


@pytest.mark.parametrize(
    ("route", "fields"),
    [
        (CHAT, {}),
        (CHAT, {"max_tokens": None, "max_completion_tokens": 32_000}),
        (CHAT, {"max_tokens": 100, "min_tokens": 100, "ignore_eos": False, "logit_bias": END}),
        (TEXT, {}),
        (TEXT, {"max_tokens": 100, "min_tokens": 100, "ignore_eos": False, "logit_bias": END}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "max_tokens",
)
def test_a_response_that_does_not_fit_ends_as_length_where_the_context_is_full(
    server: ServerProcess, route: str, fields: dict[str, Any]
) -> None:
    long = {"prompt": "q" * 1000} if route == TEXT else {"messages": [{"role": "user", "content": "q" * 890}]}
    asked = long | {"max_tokens": 32_000} | fields
    ask = Asking(server, route)
    whole, chunks = ask(**asked), ask.stream(**asked, stream_options={"include_usage": True})
    room = 1024 - prompt_tokens(whole)
    assert 10 < room < 30
    assert (used(whole), len(ids(whole)), reason(whole)) == (room, room, "length")
    assert "".join(map(delta, chunks)) == text(whole)
    assert [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]][-1] == "length"
    assert (used(chunks[-1]), prompt_tokens(chunks[-1])) == (room, prompt_tokens(whole))


CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TAG = {"type": "structural_tag", "format": {"type": "const_string", "value": "tagged"}}
FORMS: dict[str, tuple[dict[str, Any], Callable[[str], bool]]] = {
    "json": ({"json": CITY}, lambda written: json.loads(written)["city"] in ("Oslo", "Rome")),
    "json as text": ({"json": json.dumps(CITY)}, lambda written: json.loads(written)["city"] in ("Oslo", "Rome")),
    "json_object": ({"json_object": True}, lambda written: isinstance(json.loads(written), dict)),
    "regex": ({"regex": r"[0-9]{3}-[a-f]{2}"}, lambda written: written[3] == "-" and len(written) == 6),
    "choice": ({"choice": ["red", "blue"]}, lambda written: written in ("red", "blue")),
    "grammar": ({"grammar": 'root ::= "x" ("y" | "z") "!"'}, lambda written: written in ("xy!", "xz!")),
    "structural_tag": ({"structural_tag": json.dumps(TAG)}, lambda written: written == "tagged"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("route", MODELS)
def test_every_kind_of_structured_output_shapes_the_response(server: ServerProcess, route: str, form: str) -> None:
    constraint, is_right = FORMS[form]
    body = Asking(server, route)(structured_outputs=constraint, logit_bias=END, **ENOUGH)
    assert reason(body) == "stop"
    assert is_right(text(body))


def test_a_tool_call_that_the_model_writes_by_itself_is_found(server: ServerProcess) -> None:
    written: dict[str, Any] = {"tools": [TOOL], "structured_outputs": {"choice": ["Well. " + WRITTEN]}, **ENOUGH}
    choice = Asking(server, CHAT)(**written)["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"].strip() == "Well."
    (call,) = choice["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"colour": "red"}
    chunks = Asking(server, CHAT).stream(**written)
    calls = [call for chunk in chunks for own in chunk["choices"] for call in own["delta"].get("tool_calls") or ()]
    assert "".join(call["function"].get("name") or "" for call in calls) == "paint"
    assert json.loads("".join(call["function"].get("arguments") or "" for call in calls)) == {"colour": "red"}
    reasons = [own["finish_reason"] for chunk in chunks for own in chunk["choices"] if own["finish_reason"]]
    assert reasons == ["tool_calls"]


def test_the_fingerprint_is_the_same_everywhere_and_names_no_vllm(server: ServerProcess) -> None:
    marks = {Asking(server, route)(max_tokens=1)["system_fingerprint"] for route in (CHAT, TEXT)}
    marks.add(Asking(server, CHAT).stream(max_tokens=2)[-1]["system_fingerprint"])
    (mark,) = marks
    assert mark.startswith("fused-")
