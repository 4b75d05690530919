"""An answer's text and tool calls are the same in a stream and whole, wherever the answer ends."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.parser import Parser, ParserManager

from tests.fakes import build_tokenizer
from tests.server.scripted import ScriptedEngine
from ultrafuser.server.serving.installation import tool_parsers
from ultrafuser.server.serving.tool_calls import MAX_READ_ALIKE, Spellings, read_alike
from ultrafuser.server.settings import TOOL_PARSERS, ServerSettings

# vLLM's own request model marks OpenAI's older spelling as deprecated and then reads it itself.
pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated:DeprecationWarning")

STUBS = {"openai"}
"""Parsers that can be built, and then read nothing."""

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    },
}
ARGUMENTS = '{"city": "Oslo", "days": 2}'
JSON_CALL = f'{{"name": "get_weather", "arguments": {ARGUMENTS}}}'
HERMES = f"<tool_call>\n{JSON_CALL}\n</tool_call>"
XML = "<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n</function>"
GLM = "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n</tool_call>"
CALLS = {
    "apertus": f'<|tools_prefix|>[{{"get_weather": {ARGUMENTS}}}]<|tools_suffix|>',
    "functiongemma": "<start_function_call>call:get_weather{city:<escape>Oslo<escape>}<end_function_call>",
    "gigachat3": f"<|function_call|>{JSON_CALL}",
    "glm45": GLM,
    "glm47": GLM,
    "granite": f"<|tool_call|>[{JSON_CALL}]",
    "granite-20b-fc": f"<function_call> {JSON_CALL}",
    "granite4": HERMES,
    "hunyuan_a13b": f"<tool_calls>[{JSON_CALL}]</tool_calls>",
    "internlm": f"<|action_start|><|plugin|>\n{JSON_CALL}<|action_end|>",
    "kimi_k2": "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
    f"{ARGUMENTS}<|tool_call_end|><|tool_calls_section_end|>",
    "ling3": GLM,
    "llama4_pythonic": '<|python_start|>[get_weather(city="Oslo", days=2)]<|python_end|>',
    "minicpm5": '<function name="get_weather"><param name="city">Oslo</param></function>',
    "minimax_m2": '<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Oslo</parameter>\n'
    "</invoke>\n</minimax:tool_call>",
    "olmo3": '<function_calls>\nget_weather(city="Oslo", days=2)\n</function_calls>',
    "phi4_mini_json": f"functools[{JSON_CALL}]",
    "poolside_v1": GLM,
    "pythonic": '[get_weather(city="Oslo", days=2)]',
    "seed_oss": f"<seed:tool_call>\n{XML}\n</seed:tool_call>",
    "step3": "<{0}tool_calls_begin{0}><{0}tool_call_begin{0}>function<{0}tool_sep{0}>"
    '<steptml:invoke name="get_weather"><steptml:parameter name="city">Oslo</steptml:parameter></steptml:invoke>'
    "<{0}tool_call_end{0}><{0}tool_calls_end{0}>".replace("{0}", "\uff5c"),
    "xlam": f"[{JSON_CALL}]",
} | dict.fromkeys(("mimo", "qwen3_coder", "qwen3_xml", "step3p5"), f"<tool_call>\n{XML}\n</tool_call>")
"""A call as each parser's models write it; the others read calls that contain the hermes parser's marker, or none."""

Answer = tuple[str, list[tuple[str, str]]]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """The tests' tokenizer, which has none of the parsers' markers."""
    return build_tokenizer(320, 320, "text")


@pytest.fixture
def settings() -> ServerSettings:
    """A server that reads hermes' calls."""
    return ServerSettings(tool_call_parser="hermes")


def request(**fields: Any) -> ChatCompletionRequest:
    """A request that offers a tool."""
    fields = {"tool_choice": "auto"} | fields
    return ChatCompletionRequest(messages=[{"role": "user", "content": "Hi"}], tools=[TOOL], **fields)


def parser_class(name: str, tokenizer: Any) -> type[Parser]:
    """The parser that the server makes of a name."""
    parser = ParserManager.get_parser(tool_parser_name=name, enable_auto_tools=True, tokenizer=tokenizer)
    assert parser is not None
    return read_alike(parser, tokenizer)


def streamed(parser: Parser, deltas: Iterator[str], asked: ChatCompletionRequest, tokenizer: Any) -> Answer:
    """What a client puts together from a stream."""
    content = ""
    calls: dict[int, list[str]] = {}
    texts = list(deltas)
    for index, text in enumerate(texts):
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        delta = parser.parse_delta(text, token_ids, asked, [5], finished=index == len(texts) - 1)
        content += (delta and delta.content) or ""
        for call in (delta and delta.tool_calls) or ():
            own = calls.setdefault(call.index, ["", ""])
            own[0] += (call.function and call.function.name) or ""
            own[1] += (call.function and call.function.arguments) or ""
    return content, [(name, arguments) for _, (name, arguments) in sorted(calls.items())]


def whole(parser: Parser, text: str, asked: ChatCompletionRequest, tokenizer: Any) -> Answer:
    """What a client gets in one piece."""
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    _, content, calls = parser.parse(text, asked, enable_auto_tools=True, model_output_token_ids=token_ids)
    return content or "", [(call.name, call.arguments) for call in calls or ()]


def cut(text: str, size: int, seed: int = 0) -> Iterator[str]:
    """A text in deltas of this size; 0 draws each size."""
    draw = random.Random(seed)
    position = 0
    while position < len(text) or not position:
        length = size or draw.randint(1, 9)
        yield text[position : position + length]
        position += length


def endings(name: str) -> list[str]:
    """Answers that a parser is tried with, each to be cut off anywhere."""
    call = CALLS.get(name, HERMES)
    return [f"Let me see. {call}\n{call}", f"{call} and <", f"A < b, [c] {{d}} and `{HERMES[:10]}"]


@pytest.mark.parametrize("name", TOOL_PARSERS)
def test_streamed_and_whole_answers_are_equal(name: str, tokenizer: Any) -> None:
    """The last characters were missing in a stream, and an answer that was cut off was text in one, a call in the
    other."""
    parser, asked = parser_class(name, tokenizer), request()
    for number, text in enumerate(endings(name)):
        lengths = {*random.Random(number).sample(range(1, len(text)), 3), len(text)}
        for length in sorted(lengths):
            end = text[:length]
            expected = whole(parser(tokenizer, asked.tools), end, asked, tokenizer)
            for size in (3, 0):
                found = streamed(parser(tokenizer, asked.tools), cut(end, size, length), asked, tokenizer)
                assert found == expected, (end, size)


def test_a_long_answer_is_read_as_it_comes(tokenizer: Any) -> None:
    """Character by character it would take seconds, in the event loop if it is whole."""
    text = f"{'word ' * (MAX_READ_ALIKE // 5)}{HERMES}"
    parser, asked = parser_class("hermes", tokenizer), request()
    expected = whole(parser(tokenizer, asked.tools), text, asked, tokenizer)
    assert expected[1] == [("get_weather", ARGUMENTS)]
    assert streamed(parser(tokenizer, asked.tools), cut(text, 7), asked, tokenizer) == expected


@pytest.mark.parametrize("name", [name for name in CALLS if name in TOOL_PARSERS])
def test_every_parser_reads_its_own_calls(name: str, tokenizer: Any) -> None:
    parser, asked = parser_class(name, tokenizer), request()
    _, calls = whole(parser(tokenizer, asked.tools), CALLS[name], asked, tokenizer)
    assert [(called, json.loads(arguments)["city"].strip()) for called, arguments in calls] == [("get_weather", "Oslo")]


def test_the_list_of_parsers_is_what_the_tests_tokenizer_can_build(tokenizer: Any) -> None:
    buildable = []
    for name in tool_parsers():
        try:
            parser_class(name, tokenizer)
        except (TypeError, ImportError):
            continue
        buildable.append(name)
    assert sorted(set(buildable) - STUBS) == sorted(TOOL_PARSERS)


NAMED = {"type": "function", "function": {"name": "get_weather"}}


@pytest.mark.parametrize("tool_choice", ["none", "required", NAMED], ids=["none", "required", "named"])
@pytest.mark.parametrize("name", ["hermes", "granite", "pythonic", "qwen3_coder"])
def test_demanded_calls_are_equal_wherever_they_are_cut_off(name: str, tool_choice: Any, tokenizer: Any) -> None:
    """A list of calls that was cut off was lost from a whole answer."""
    parser, asked = parser_class(name, tokenizer), request(tool_choice=tool_choice)
    listed = f'[{{"name": "get_weather", "parameters": {ARGUMENTS}}}, {{"name": "get_weather", "parameters": {{}}}}]'
    for text in (listed, ARGUMENTS, CALLS.get(name, HERMES)):
        for length in range(1, len(text) + 1, 7):
            expected = whole(parser(tokenizer, asked.tools), text[:length], asked, tokenizer)
            for size in (1, 3, 0):
                found = streamed(parser(tokenizer, asked.tools), cut(text[:length], size, length), asked, tokenizer)
                assert found == expected, (text[:length], size)


@pytest.mark.parametrize("tool_choice", ["required", NAMED], ids=["required", "named"])
@pytest.mark.parametrize("name", ["hermes", "glm45", "kimi_k2", "mimo", "minimax_m2", "qwen3_coder"])
def test_a_demanded_call_that_is_cut_off_is_no_text(name: str, tool_choice: Any, tokenizer: Any) -> None:
    """`<too` was shown as what the model says."""
    parser, text = parser_class(name, tokenizer), CALLS.get(name, HERMES)
    for length in range(1, len(text) + 1):
        asked = request(tool_choice=tool_choice)
        parser(tokenizer, asked.tools).adjust_request(asked)
        content, calls = whole(parser(tokenizer, asked.tools), text[:length], asked, tokenizer)
        assert content.strip() == "", text[:length]
        for size in (1, 0):
            deltas = cut(text[:length], size, length)
            assert streamed(parser(tokenizer, asked.tools), deltas, asked, tokenizer) == (content, calls)
    assert [called for called, _ in calls] == ["get_weather"]


def test_what_follows_the_end_of_arguments_is_no_part_of_them(tokenizer: Any) -> None:
    parser, asked = parser_class("hermes", tokenizer), request()
    text = f'<tool_call>{{"name": "get_weather", "arguments": {ARGUMENTS}, "id": 3}}</tool_call>'
    expected = ("", [("get_weather", ARGUMENTS)])
    assert whole(parser(tokenizer, asked.tools), text, asked, tokenizer) == expected
    assert streamed(parser(tokenizer, asked.tools), cut(text, 1), asked, tokenizer) == expected


def test_an_added_token_is_one_piece_however_it_arrives(tokenizer: Any) -> None:
    spellings = Spellings(tokenizer)
    assert list(spellings.split("a<|im_end|><s>", True)) == ["a", "<|im_end|>", "<s>"]
    assert list(spellings.split("a<|im_e", False)) == ["a"]
    assert list(spellings.split("a<|im_x", False)) == list("a<|im_x")
    assert list(spellings.split("a<|im_e", True)) == list("a<|im_e")


SCRIPTS = [
    "So it is <",
    "Use <tool",
    "<tool_call>",
    HERMES,
    f"I look. {HERMES}\n{HERMES}",
    f"{HERMES[:-20]}",
    '<tool_call>{"name": "get_weather", "arguments": {"city": "Os',
    "<tool_call>not json</tool_call> yes",
]


async def answers(client: httpx.AsyncClient, body: dict[str, Any]) -> tuple[Any, Any]:
    """Text, calls and the reason of the end: whole, and put together from a stream."""
    choice = (await client.post("/v1/chat/completions", json=body)).json()["choices"][0]
    functions = [call["function"] for call in choice["message"].get("tool_calls") or ()]
    calls = [(function["name"], function["arguments"]) for function in functions]
    expected = (choice["message"]["content"] or "", calls, choice["finish_reason"])
    lines = (await client.post("/v1/chat/completions", json=body | {"stream": True})).text.splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    content, reason = "", None
    told: dict[int, list[str]] = {}
    for own in (event["choices"][0] for event in events):
        content += own["delta"].get("content") or ""
        reason = own["finish_reason"] or reason
        for call in own["delta"].get("tool_calls") or ():
            parts = told.setdefault(call["index"], ["", ""])
            parts[0] += call["function"].get("name") or ""
            parts[1] += call["function"].get("arguments") or ""
    return expected, (content, [tuple(parts) for _, parts in sorted(told.items())], reason)


@pytest.mark.parametrize("script", SCRIPTS, ids=range(len(SCRIPTS)))
async def test_a_stream_ends_as_the_whole_answer_does(
    client: httpx.AsyncClient, engine: ScriptedEngine, script: str
) -> None:
    """`max_tokens` within a call was `tool_calls` in one and `length` in the other."""
    engine.script = script
    body = {"messages": [{"role": "user", "content": "Hi"}], "tools": [TOOL], "temperature": 0}
    for max_tokens in (None, len(script) // 3, len(script) // 2):
        limits = {} if max_tokens is None else {"max_completion_tokens": max_tokens}
        expected, found = await answers(client, body | limits)
        assert found == expected
        assert found[0] or found[1]
        assert found[2] == ("length" if max_tokens else "tool_calls" if found[1] else "stop")


async def test_a_demanded_call_that_the_limit_cuts_ends_by_its_length(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    engine.script = HERMES
    body = {"messages": [{"role": "user", "content": "Hi"}], "tools": [TOOL], "tool_choice": "required"}
    for max_tokens in (1, 3, 8):
        expected, found = await answers(client, body | {"max_completion_tokens": max_tokens})
        assert found == expected
        assert found == ("", [], "length")


def test_the_page_lists_the_parsers() -> None:
    page = (Path(__file__).parents[3] / "docs" / "api.md").read_text()
    listed = page.split("<!-- tool parsers -->")[1].split("<!-- end of tool parsers -->")[0]
    assert tuple(listed.split()) == TOOL_PARSERS
