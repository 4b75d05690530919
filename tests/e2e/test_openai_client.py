"""The official client against a real server: what it can ask for, it gets, and the text is the fused model's."""

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam

from tests.e2e.conftest import MODEL
from tests.e2e.process import ServerProcess
from tests.fakes import EOS_ID
from tests.reference import answer
from ultrafuser.gating.model.fusion import load_fusion

HI: list[ChatCompletionMessageParam] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Name three colours."},
]
CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER: ChatCompletionToolParam = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Weather of a city", "parameters": CITY, "strict": True},
}
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 24, "extra_body": {"ignore_eos": True}}


def ask(client: openai.OpenAI, messages: list[ChatCompletionMessageParam] = HI, **options: Any) -> Any:
    """A greedy response of 24 tokens, unless the options say otherwise."""
    return client.chat.completions.create(messages=messages, **(GREEDY | options))


def ask_in_form(client: openai.OpenAI, **options: Any) -> Any:
    """A response whose form the options demand; it ends as soon as the form allows."""
    end = {str(EOS_ID): 100}
    return client.chat.completions.create(model=MODEL, messages=HI, max_tokens=200, logit_bias=end, **options)


def test_the_greedy_response_is_the_references(client: openai.OpenAI, tiny_fusion: Path) -> None:
    expected, prompts = answer(load_fusion(tiny_fusion), HI, max_new_tokens=24)
    assert expected.top2_gap.min() > 1e-3
    response = ask(client, extra_body={"ignore_eos": True, "return_token_ids": True})
    assert response.choices[0].token_ids == expected.token_ids
    assert response.usage.prompt_tokens == max(len(prompt) for prompt in prompts)


def test_a_response_has_text_reason_and_usage(client: openai.OpenAI) -> None:
    response = ask(client)
    assert response.id.startswith("chatcmpl-")
    assert response.object == "chat.completion"
    assert response.model == MODEL
    assert response.choices[0].message.role == "assistant"
    assert response.choices[0].message.content
    assert response.choices[0].finish_reason == "length"
    assert response.usage.completion_tokens == 24
    assert response.usage.total_tokens == response.usage.prompt_tokens + 24


def test_a_stream_says_the_same_in_pieces(client: openai.OpenAI) -> None:
    whole = ask(client)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert reasons == ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_a_stop_string_ends_the_response_before_it(client: openai.OpenAI) -> None:
    text = ask(client).choices[0].message.content
    stop = text[8:10]
    response = ask(client, stop=[stop])
    assert response.choices[0].finish_reason == "stop"
    assert response.choices[0].message.content == text[: text.index(stop)]


def test_the_fusion_files_eos_ends_the_response(client: openai.OpenAI) -> None:
    choice = ask(client, logit_bias={str(EOS_ID): 100}, extra_body={"return_token_ids": True}).choices[0]
    assert choice.finish_reason == "stop"
    assert choice.token_ids == [EOS_ID]
    assert choice.message.content == ""


def test_n_responses_are_independent_and_seeded(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"temperature": 1, "n": 3, "seed": 7}
    first = [choice.message.content for choice in ask(client, **options).choices]
    again = [choice.message.content for choice in ask(client, **options).choices]
    assert len(set(first)) == 3
    assert first == again


def test_logprobs_belong_to_the_text_and_are_normalised(client: openai.OpenAI) -> None:
    choice = ask(client, logprobs=True, top_logprobs=5).choices[0]
    content = choice.logprobs.content
    assert "".join(entry.token for entry in content) == choice.message.content
    for entry in content:
        assert entry.logprob == entry.top_logprobs[0].logprob
        assert len(entry.top_logprobs) == 5
        assert sum(math.exp(top.logprob) for top in entry.top_logprobs) <= 1 + 1e-4


def test_a_follow_up_turn_reuses_the_cache(client: openai.OpenAI) -> None:
    question: ChatCompletionMessageParam = {"role": "user", "content": "Tell me a long story about a lighthouse. " * 4}
    answer = ask(client, [question], max_tokens=64).choices[0].message.content
    follow_up: list[ChatCompletionMessageParam] = [
        question,
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "And then?"},
    ]
    usage = ask(client, follow_up).usage
    assert usage.prompt_tokens_details.cached_tokens >= 64


def test_text_parts_are_accepted(client: openai.OpenAI) -> None:
    parts: list[ChatCompletionMessageParam] = [
        {"role": "user", "content": [{"type": "text", "text": "Name"}, {"type": "text", "text": "it."}]}
    ]
    joined: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Name\nit."}]
    assert ask(client, parts).choices[0].message.content == ask(client, joined).choices[0].message.content


def test_json_schema_shapes_the_response(client: openai.OpenAI) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}
    choice = ask_in_form(client, response_format=schema).choices[0]
    assert choice.finish_reason == "stop"
    assert json.loads(choice.message.content)["city"] in ("Oslo", "Rome")


@pytest.mark.parametrize("tool_choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_demanded_tool_is_called(client: openai.OpenAI, tool_choice: Any) -> None:
    call = ask_in_form(client, tools=[WEATHER], tool_choice=tool_choice).choices[0].message.tool_calls[0]
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")


def test_a_streamed_tool_call_can_be_put_together(client: openai.OpenAI) -> None:
    chunks = ask_in_form(client, tools=[WEATHER], tool_choice="required", stream=True)
    deltas = [call for chunk in chunks for choice in chunk.choices for call in choice.delta.tool_calls or []]
    first = [call for call in deltas if call.index == 0]
    assert "".join(call.function.name or "" for call in first if call.function) == "get_weather"
    arguments = "".join(call.function.arguments or "" for call in first if call.function)
    assert json.loads(arguments)["city"] in ("Oslo", "Rome")


def test_tools_may_be_left_unused(client: openai.OpenAI) -> None:
    choice = ask(client, tools=[WEATHER], tool_choice="auto").choices[0]
    assert choice.message.content
    assert not choice.message.tool_calls


def test_tools_reach_the_prompt(client: openai.OpenAI) -> None:
    without = ask(client).usage.prompt_tokens
    assert ask(client, tools=[WEATHER]).usage.prompt_tokens > without + 50


def test_raw_prompts_are_continued(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 8}
    text = client.completions.create(prompt="Once upon", **options).choices[0].text
    echoed = client.completions.create(prompt="Once upon", echo=True, **options).choices[0].text
    assert echoed == "Once upon" + text
    several = client.completions.create(prompt=["Once upon", "Twice"], **options)
    assert [choice.index for choice in several.choices] == [0, 1]
    assert several.choices[0].text == text
    scored = client.completions.create(prompt="Once upon", logprobs=2, **options).choices[0]
    assert scored.logprobs is not None
    assert "".join(scored.logprobs.tokens or []) == text


def test_token_ids_are_as_good_as_text(client: openai.OpenAI, server: ServerProcess) -> None:
    tokens = httpx.post(f"{server.url}/tokenize", json={"prompt": "Once upon"}).json()["tokens"]
    options: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 8}
    by_text = client.completions.create(prompt="Once upon", **options).choices[0].text
    assert client.completions.create(prompt=tokens, **options).choices[0].text == by_text


def test_the_model_is_listed_and_found(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_errors_are_those_the_client_knows(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="other", messages=HI)
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model=MODEL, messages=HI, temperature=-1)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as wrong_stream:
        client.chat.completions.create(model=MODEL, messages=HI, temperature=-1, stream=True)
    assert wrong_stream.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as too_long:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "word " * 2000}])
    assert too_long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as unfused:
        client.chat.completions.create(model=MODEL, messages=HI, extra_body={"prompt_logprobs": 1})
    assert unfused.value.param == "prompt_logprobs"


async def test_many_streams_at_once_say_what_each_says_alone(async_client: openai.AsyncOpenAI) -> None:
    async def stream(number: int) -> str:
        text = f"Count to {number}. " * (1 + number % 5)
        messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": text}]
        chunks = await async_client.chat.completions.create(messages=messages, stream=True, **GREEDY)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks if chunk.choices])

    numbers = range(1, 17)
    alone = [await stream(number) for number in numbers]
    together = await asyncio.gather(*(stream(number) for number in numbers))
    assert list(together) == alone
    assert len(set(alone)) > 8
