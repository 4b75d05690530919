"""A constraint is kept to the letter or refused by its field, on every way to one; never is it the server's fault."""

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema  # type: ignore[import-untyped]
import pytest
from hypothesis import HealthCheck, given, settings

from tests.e2e.process import ServerProcess
from tests.fakes import EOS_ID
from tests.server.grammar.schemas import EXPRESSIONS, schemas

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
PROMPTS: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "Name three colours."}]},
    TEXT: {"prompt": "Name three colours."},
}
FIRST_BYTE_ID = 4
"""The tiny tokenizer's id of the byte 0; the others follow."""

LIKELY_END = {str(EOS_ID): 100} | {str(FIRST_BYTE_ID + ord(character)): 4 for character in '"}]'}
"""A random model, free to go on, would."""


def tool(parameters: Any, **more: Any) -> dict[str, Any]:
    """A tool that paints."""
    return {"type": "function", "function": {"name": "paint", "parameters": parameters, **more}}


NAMED = {"type": "function", "function": {"name": "paint"}}
PAINTING = "tools[0].function.parameters"


def ways_of_a_schema(schema: Any) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Every way in which a schema gets into a request: the route, the request's fields, and the one that is named."""
    in_format = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}
    content = {"type": "json_schema", "json_schema": schema}
    tag = {"type": "structural_tag", "format": {"type": "tag", "begin": "<a>", "content": content, "end": "</a>"}}
    older = {
        "type": "structural_tag",
        "structures": [{"begin": "<a>", "schema": schema, "end": "</a>"}],
        "triggers": ["<a"],
    }
    for route in (CHAT, TEXT):
        yield route, in_format, "response_format"
        yield route, {"structured_outputs": {"json": schema}}, "structured_outputs.json"
        yield route, {"structured_outputs": {"json": json.dumps(schema)}}, "structured_outputs.json"
        yield route, {"response_format": tag}, "response_format"
        yield route, {"response_format": older}, "response_format"
        yield route, {"structured_outputs": {"structural_tag": json.dumps(tag)}}, "structured_outputs.structural_tag"
    yield CHAT, {"tools": [tool(schema)], "tool_choice": "required"}, PAINTING
    yield CHAT, {"tools": [tool(schema)], "tool_choice": NAMED}, PAINTING
    yield CHAT, {"tools": [tool(schema, strict=True)]}, PAINTING
    yield CHAT, {"tools": [tool(schema, strict=True)], **in_format, "tool_choice": "required"}, PAINTING


def ways_of_a_regex(regex: str) -> Iterator[tuple[str, dict[str, Any], str]]:
    """The same of a regular expression."""
    tag = {"type": "structural_tag", "format": {"type": "regex", "pattern": regex}}
    for route in (CHAT, TEXT):
        yield route, {"structured_outputs": {"regex": regex}}, "structured_outputs.regex"
        yield route, {"response_format": tag}, "response_format"


def refused(server: ServerProcess, route: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The error object of a request that is refused."""
    response = httpx.post(server.url + route, json=PROMPTS[route] | {"max_tokens": 8} | fields, timeout=60)
    assert response.status_code == 400, (response.text, fields)
    error: dict[str, Any] = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    return error


@pytest.fixture
def quiet(server: ServerProcess) -> Iterator[None]:
    """Nothing that a test does is an error in the log."""
    before = len(server.log)
    yield
    said = server.log[before:]
    assert not re.search(r"ERROR|Traceback", said), said


BAD_SCHEMAS: list[tuple[Any, str]] = [
    ({"$ref": "#"}, "nothing fulfils it"),
    ({"type": "object", "properties": {"a": {"type": "string", "pattern": "\\p{L}"}}}, "/properties/a/pattern"),
    ({"type": "object", "properties": {"a": {"type": "string", "minLength": -1}}}, "/properties/a/minLength"),
    ({"type": "object", "properties": {"a": {"not": {"minimum": 1}}}}, "/properties/a/not"),
]


@pytest.mark.parametrize(("schema", "reason"), BAD_SCHEMAS, ids=[reason for _, reason in BAD_SCHEMAS])
def test_a_schema_that_cannot_be_kept_is_refused_on_every_way(
    server: ServerProcess, quiet: None, schema: Any, reason: str
) -> None:
    for route, fields, param in ways_of_a_schema(schema):
        for stream in (False, True):
            error = refused(server, route, fields | {"stream": stream})
            assert error["param"] == param, fields
            assert reason in error["message"], fields


@pytest.mark.parametrize("regex", ["\\p{L}+", "[^\\s\\S]", "\\", "(?=a)b"])
def test_a_regex_that_cannot_be_kept_is_refused_on_every_way(server: ServerProcess, quiet: None, regex: str) -> None:
    for route, fields, param in ways_of_a_regex(regex):
        assert refused(server, route, fields)["param"] == param


BAD_FORMS: list[tuple[dict[str, Any], str]] = [
    ({"structured_outputs": {"grammar": "root ::= root"}}, "structured_outputs.grammar"),
    ({"structured_outputs": {"grammar": 'start: "a" start'}}, "structured_outputs.grammar"),
    ({"structured_outputs": {"grammar": "start: ("}}, "structured_outputs.grammar"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
    ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
    ({"structured_outputs": {"structural_tag": '{"structures": [1]}'}}, "structured_outputs.structural_tag"),
    ({"structured_outputs": {"regex": "a" * 9 + "{9}" * 2}}, "structured_outputs.regex"),
    ({"response_format": {"type": "structural_tag", "format": {"type": "grammar", "grammar": "x"}}}, "response_format"),
]


@pytest.mark.parametrize("route", [CHAT, TEXT])
@pytest.mark.parametrize(("fields", "param"), BAD_FORMS, ids=[json.dumps(fields)[:60] for fields, _ in BAD_FORMS])
def test_whatever_is_wrong_with_a_constraint_is_the_clients_fault(
    server: ServerProcess, quiet: None, route: str, fields: dict[str, Any], param: str
) -> None:
    assert refused(server, route, fields)["param"] == param


def called(server: ServerProcess, **fields: Any) -> Any:
    """The arguments of the call that is the response; None if it was cut."""
    body = PROMPTS[CHAT] | {"max_tokens": 150, "temperature": 0, "logit_bias": LIKELY_END} | fields
    response = httpx.post(server.url + CHAT, json=body, timeout=60)
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    if choice["finish_reason"] == "length":
        return None
    return json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"])


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_a_call_that_is_demanded_follows_the_parameters(server: ServerProcess, choice: Any) -> None:
    """Of a tool that was not strict the arguments were free."""
    schema = {
        "type": "object",
        "properties": {
            "colour": {"$ref": "#/definitions/colour"},
            "times": {"allOf": [{"enum": [1, 2]}, {"minimum": 2}]},
        },
        "required": ["colour", "times"],
        "definitions": {"colour": {"type": "string", "enum": ["red", 3]}},
    }
    assert called(server, tools=[tool(schema)], tool_choice=choice) == {"colour": "red", "times": 2}
    assert called(server, tools=[tool(None)], tool_choice=choice) == {}


@pytest.mark.parametrize("more", [{}, {"parallel_tool_calls": False}, {"tool_choice": "auto"}])
def test_a_tool_that_is_only_offered_is_never_refused(server: ServerProcess, more: dict[str, Any]) -> None:
    for schema, _ in BAD_SCHEMAS:
        for strict in ({}, {"strict": False}):
            body = PROMPTS[CHAT] | {"max_tokens": 4, "tools": [tool(schema, **strict)]} | more
            assert httpx.post(server.url + CHAT, json=body, timeout=60).status_code == 200


SAME_EVERY_TIME = settings(
    derandomize=True, database=None, deadline=None, max_examples=20, suppress_health_check=list(HealthCheck)
)


def written(server: ServerProcess, route: str, fields: dict[str, Any]) -> str | None:
    """The response to a constraint; None if it was refused or cut."""
    body = PROMPTS[route] | {"max_tokens": 60, "temperature": 1, "seed": 1, "logit_bias": LIKELY_END} | fields
    response = httpx.post(server.url + route, json=body, timeout=60)
    assert response.status_code in (200, 400), (response.text, fields)
    if response.status_code == 400:
        assert response.json()["error"]["param"], response.text
        return None
    (choice,) = response.json()["choices"]
    text: str = choice["message"]["content"] if route == CHAT else choice["text"]
    return text if choice["finish_reason"] == "stop" else None


@pytest.mark.filterwarnings("ignore:Possible:FutureWarning")
def test_a_random_schema_is_kept_or_refused(server: ServerProcess, quiet: None) -> None:
    num_whole = 0

    @SAME_EVERY_TIME
    @given(schemas())
    def ask(schema: Any) -> None:
        nonlocal num_whole
        fields = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}
        text = written(server, CHAT, fields)
        if text is not None:
            num_whole += 1
            jsonschema.Draft202012Validator(schema).validate(json.loads(text))

    ask()
    assert num_whole > 2


@pytest.mark.filterwarnings("ignore:Possible:FutureWarning")
def test_a_random_regex_is_kept_or_refused(server: ServerProcess, quiet: None) -> None:
    @SAME_EVERY_TIME
    @given(EXPRESSIONS)
    def ask(regex: str) -> None:
        text = written(server, TEXT, {"structured_outputs": {"regex": regex}})
        assert text is None or re.search(regex, text)

    ask()
