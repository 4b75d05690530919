"""A made-up model behind a real HTTP server: it writes English words at random, in the form that it is asked for.

What it says depends on the request's seed alone, so that two runs can be compared word by word. Instructions differ
enough to be no duplicates; a share of the answers can be replaced by faults.
"""

import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tests.gating.evaluation.endpoint import Endpoint, Reply

_TEXT = """
about after again answer apple argue balance before begin between bicycle bottle bread bridge brother build
burn candle carry castle chapter circle climate cloud coast colour compare copper corner cotton count country
cousin describe desert dinner divide doctor double dream during earth either electric engine enough evening
explain family farmer feather field finger finish flower follow forest forget friend garden gentle glass
golden grammar harbour heavy history holiday honest horse hundred imagine improve island journey judge kitchen
ladder language learn letter library listen machine market measure memory middle minute mirror money morning
mountain museum music narrow natural needle neighbour number object ocean often orange paper parent pencil
people picture planet plastic pocket poem police prepare pressure prison problem promise question quick quiet
railway reason recipe remember repeat river sailor sample school season secret sentence several shadow silver
simple sister smooth soldier spring square station story strange street student summer table teacher thunder
ticket together travel triangle uncle under valley village violin voice water weather window winter without
wonder yellow yesterday young
"""
WORDS = _TEXT.split()

Fault = Callable[[dict[str, Any], int], Reply | None]
"""The request and how often its last message was seen before -> what goes wrong; None: nothing."""


class ModelEndpoint(Endpoint):
    """Answers every request by its seed, unless there is a fault."""

    def __init__(self, fault: Fault = lambda body, before: None) -> None:
        super().__init__(lambda question, before: Reply())
        self.fault = fault

    def decide(self, body: dict[str, Any], before: int) -> Reply:
        return self.fault(body, before) or answer(body)


@contextmanager
def serving_model(fault: Fault = lambda body, before: None) -> Iterator[ModelEndpoint]:
    """A server for as long as the block runs."""
    endpoint = ModelEndpoint(fault)
    try:
        yield endpoint
    finally:
        endpoint.close()


def answer(body: dict[str, Any]) -> Reply:
    """What the model says: a value of the request's schema, or some sentences."""
    source = random.Random(body["seed"])
    schema = schema_of(body)
    text = json.dumps(_value(schema, source)) if schema else _words(source, 40) + "."
    prompt_tokens = sum(len(message["content"]) for message in body["messages"]) // 4
    return Reply(text, usage={"prompt_tokens": prompt_tokens, "completion_tokens": len(text) // 4})


def schema_of(body: dict[str, Any]) -> dict[str, Any] | None:
    """The JSON schema that a request asks for."""
    return body.get("response_format", {}).get("json_schema", {}).get("schema")


def _value(schema: dict[str, Any], source: random.Random) -> Any:
    if schema["type"] == "object":
        return {name: _value(own, source) for name, own in schema["properties"].items()}
    if schema["type"] == "array":
        return [_value(schema["items"], source) for _ in range(schema["maxItems"])]
    return _words(source, 12 if schema["maxLength"] > 100 else 4)[: schema["maxLength"]]


def _words(source: random.Random, count: int) -> str:
    return " ".join(source.choices(WORDS, k=count))
