"""The Responses API with clients that know nothing of us, unmodified: OpenAI's own, and its Agents SDK."""

import json
from typing import Any, Literal

import openai
import pytest
from agents import Agent, ModelSettings, OpenAIResponsesModel, Runner, function_tool, set_tracing_disabled
from openai.types.responses import ResponseFunctionToolCall
from pydantic import BaseModel

from tests.e2e.conftest import MODEL
from tests.e2e.process import ServerProcess, wait_for
from tests.fakes import EOS_ID

QUESTION = "Name three colours."
NUM_TOKENS = 24
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0, "extra_body": {"ignore_eos": True}}
AT_ONCE: dict[str, Any] = {"logit_bias": {str(EOS_ID): 100}}
"""Ends an answer as soon as its form allows."""
WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "get_weather",
    "description": "Weather of a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}
RUNNING, WRITTEN, LEFT = "vllm:num_requests_running{", "vllm:generation_tokens_total{", "fused_client_disconnects_total"


def ask(client: openai.OpenAI, asked: Any = QUESTION, **options: Any) -> Any:
    """A greedy response of 24 tokens, unless the options say otherwise."""
    return client.responses.create(input=asked, **({**GREEDY, "max_output_tokens": NUM_TOKENS} | options))


def test_an_answer_is_that_of_the_chat(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
    chat = client.chat.completions.create(messages=messages, max_tokens=NUM_TOKENS, **GREEDY)
    response = ask(client, instructions="Be brief.")
    assert response.output_text == chat.choices[0].message.content
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.usage.input_tokens == chat.usage.prompt_tokens
    assert response.usage.output_tokens == NUM_TOKENS


def test_a_stream_says_the_same_in_pieces(client: openai.OpenAI) -> None:
    whole = ask(client)
    events = list(ask(client, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.output_text == whole.output_text
    assert events[-1].response.usage.output_tokens == NUM_TOKENS


def test_the_clients_own_stream_accumulates_an_answer(client: openai.OpenAI) -> None:
    expected = ask(client, text={"format": COLOUR}, extra_body=AT_ONCE).output_text
    options: dict[str, Any] = {"model": MODEL, "temperature": 0, "extra_body": AT_ONCE}
    with client.responses.stream(input=QUESTION, text={"format": COLOUR}, **options) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        assert "".join(deltas) == expected == stream.get_final_response().output_text


COLOUR: Any = {"type": "json_schema", "name": "colour", "schema": {"enum": ["red", "blue"]}, "strict": True}


def test_a_second_turn_takes_the_items_of_the_first(client: openai.OpenAI) -> None:
    """As the client dumps them; a chat that says the same gives the same answer."""
    first = ask(client)
    items = [{"role": "user", "content": QUESTION}, *(item.to_dict() for item in first.output)]
    second = ask(client, [*items, {"role": "user", "content": "And animals?"}])
    messages: Any = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "And animals?"},
    ]
    chat = client.chat.completions.create(messages=messages, max_tokens=NUM_TOKENS, **GREEDY)
    assert second.output_text == chat.choices[0].message.content
    assert second.usage.input_tokens == chat.usage.prompt_tokens


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "get_weather"}])
def test_a_demanded_call_and_its_result(client: openai.OpenAI, choice: Any) -> None:
    options = {"tools": [WEATHER], "tool_choice": choice, "max_output_tokens": 200, "extra_body": AT_ONCE}
    first = ask(client, **options)
    (call,) = first.output
    assert isinstance(call, ResponseFunctionToolCall)
    assert (call.name, first.status) == ("get_weather", "completed")
    assert json.loads(call.arguments)["city"] in ("Oslo", "Rome")
    (streamed,) = list(ask(client, stream=True, **options))[-1].response.output
    assert streamed.arguments == call.arguments
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "Rain."}
    items = [{"role": "user", "content": QUESTION}, call.to_dict(), result]
    assert ask(client, items, tools=[WEATHER]).output_text


def test_a_custom_tools_input_is_a_text(client: openai.OpenAI) -> None:
    tool = {"type": "custom", "name": "note", "description": "Takes a note."}
    choice = {"type": "custom", "name": "note"}
    options = {"tools": [tool], "tool_choice": choice, "max_output_tokens": 60, "extra_body": AT_ONCE}
    (call,) = ask(client, **options).output
    assert (call.type, call.name) == ("custom_tool_call", "note")
    result = {"type": "custom_tool_call_output", "call_id": call.call_id, "output": "Taken."}
    items = [{"role": "user", "content": QUESTION}, call.to_dict(), result]
    assert ask(client, items, tools=[tool]).output_text


class Colour(BaseModel):
    """What a structured answer is."""

    name: Literal["red", "blue"]
    is_warm: bool


def test_a_structured_answer_parses(client: openai.OpenAI) -> None:
    response = client.responses.parse(model=MODEL, input=QUESTION, text_format=Colour, extra_body=AT_ONCE)
    assert isinstance(response.output_parsed, Colour)
    assert response.status == "completed"


def test_an_unknown_model_and_a_stored_response_are_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="other"):
        client.responses.create(model="other", input=QUESTION)
    with pytest.raises(openai.NotFoundError, match="stores none"):
        client.responses.retrieve("resp_1")
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        ask(client, previous_response_id="resp_1")


def test_a_client_that_leaves_ends_its_request(client: openai.OpenAI, server: ServerProcess) -> None:
    left, written = server.metric(LEFT), server.metric(WRITTEN)
    stream = ask(client, stream=True, max_output_tokens=800)
    for event in stream:
        if event.type == "response.output_text.delta":
            break
    stream.close()
    wait_for(lambda: server.metric(LEFT) == left + 1, "the server has noticed")
    wait_for(lambda: server.metric(RUNNING) == 0, "the request has ended")
    assert server.metric(WRITTEN) < written + 800


# OpenAI's Agents SDK


@function_tool
def get_weather(city: Literal["Oslo", "Rome"]) -> str:
    """Weather of a city."""
    return f"Rain in {city}."


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "stream"])
async def test_an_agent_calls_its_function_and_answers(async_client: openai.AsyncOpenAI, streamed: bool) -> None:
    set_tracing_disabled(True)
    settings = ModelSettings(tool_choice="required", temperature=0, max_tokens=200, extra_body=AT_ONCE)
    agent = Agent(
        name="Weather",
        instructions="Be brief.",
        model=OpenAIResponsesModel(MODEL, async_client),
        tools=[get_weather],
        model_settings=settings,
    )
    if streamed:
        result: Any = Runner.run_streamed(agent, QUESTION)
        kinds = [event.name async for event in result.stream_events() if event.type == "run_item_stream_event"]
        assert kinds[:2] == ["tool_called", "tool_output"]
    else:
        result = await Runner.run(agent, QUESTION)
    outputs = [item.output for item in result.new_items if item.type == "tool_call_output_item"]
    assert outputs in (["Rain in Oslo."], ["Rain in Rome."])
    assert result.final_output == ""  # the second answer may end at once, and does
