"""Which tools are in force, what the chat calls them, and what becomes of the choice among them."""

import json
from typing import Any

import pytest

from tests.server.scripted import ScriptedEngine
from tests.server.serving.responses.conftest import Asking
from ultrafuser.server.requests.grammar_worker import Trial
from ultrafuser.server.serving.responses.toolbox import decode_input, encode_input

# vLLM's own request model marks OpenAI's older spelling as deprecated and then reads it itself.
pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated:DeprecationWarning")

OBJECT = {"type": "object", "properties": {"x": {"type": "integer"}}}
FUNCTION = {"type": "function", "name": "f", "description": "F.", "parameters": OBJECT, "strict": False}
GRAMMAR = {"type": "grammar", "syntax": "lark", "definition": 'start: "a"'}
CUSTOM = {"type": "custom", "name": "patch", "description": "Edits files.", "format": GRAMMAR}
INNER = {"type": "function", "name": "f", "description": None, "parameters": None, "strict": False}
SPACE = {"type": "namespace", "name": "mcp", "description": "M.", "tools": [INNER]}
HOSTED: list[dict[str, Any]] = [
    {"type": "web_search", "external_web_access": True},
    {"type": "local_shell"},
    {"type": "mcp", "server_label": "x", "server_url": "https://x"},
    {"type": "tool_search", "execution": "client"},
    {"type": "unheard_of", "anything": [1]},
]


def described(engine: ScriptedEngine) -> list[Any]:
    """The functions that the last prompt tells of."""
    text = engine.prompts[-1]["prompt"]
    inside = text.partition("<tools>\n")[2].partition("\n</tools>")[0]
    return [json.loads(line)["function"] for line in inside.splitlines()]


async def test_tools_are_functions_to_the_model_and_themselves_to_the_client(
    engine: ScriptedEngine, ask: Asking
) -> None:
    response = await ask(tools=[*HOSTED[:2], FUNCTION, CUSTOM, SPACE, *HOSTED[2:]])
    assert [function["name"] for function in described(engine)] == ["f", "patch", "mcp__f"]
    _, patch, _ = described(engine)
    assert patch["parameters"]["required"] == ["input"]
    assert patch["description"].startswith("Edits files.")
    assert GRAMMAR["definition"] in patch["description"]
    assert response["tools"] == [FUNCTION, CUSTOM, SPACE]


async def test_a_call_of_a_custom_tool_is_held_to_its_one_text(engine: ScriptedEngine, ask: Asking) -> None:
    """Else the model might call it by other arguments, of which no input could be made."""
    await ask(tools=[CUSTOM])
    assert '"input"' in str(engine.params[-1].structured_outputs.structural_tag)
    assert "additionalProperties" in str(engine.params[-1].structured_outputs.structural_tag)


async def test_without_a_tool_in_force_nothing_is_told_of_tools(engine: ScriptedEngine, ask: Asking) -> None:
    response = await ask(tools=HOSTED)
    bare = await ask()
    assert response["tools"] == bare["tools"] == []
    with_hosted, without = engine.prompts
    assert with_hosted["specialist_prompts"] == without["specialist_prompts"]


async def test_tools_that_items_bring_are_offered_once(engine: ScriptedEngine, ask: Asking) -> None:
    """Codex declares them so, and finds the same ones again."""
    search = {"type": "tool_search_call", "call_id": "a", "arguments": {"query": "f"}, "execution": "client"}
    items = [
        {"type": "additional_tools", "role": "developer", "tools": [CUSTOM]},
        {"role": "user", "content": "Hi"},
        search,
        {"type": "tool_search_output", "call_id": "a", "tools": [SPACE]},
    ]
    await ask(input=items, tools=[SPACE])
    assert [function["name"] for function in described(engine)] == ["mcp__f", "patch"]


@pytest.mark.parametrize(
    ("tools", "param"),
    [
        (["f"], "tools.0.type"),
        ([{"name": "f"}], "tools.0.type"),
        ([HOSTED[0], {"type": "function"}], "tools.1.name"),
        ([{"type": "function", "function": {"name": "f"}}], "tools.0.function"),
        ([{**FUNCTION, "parameters": "x"}], "tools.0.parameters"),
        ([{**FUNCTION, "strict": "yes"}], "tools.0.strict"),
        ([{**CUSTOM, "format": {"type": "grammar", "syntax": "ebnf"}}], "tools.0.format"),
        ([{**CUSTOM, "format": {"type": "grammar", "syntax": "lark"}}], "tools.0.format.definition"),
        ([{**SPACE, "name": None}], "tools.0.name"),
        ([{**SPACE, "tools": "f"}], "tools.0.tools"),
        ([SPACE, {**FUNCTION, "name": "mcp__f"}], "tools.1.name"),
        ([FUNCTION, {**CUSTOM, "name": "f"}], "tools.1.name"),
        ([HOSTED[0], {**FUNCTION, "strict": True, "parameters": {"$ref": "#"}}], "tools.1.parameters"),
        (
            [{**SPACE, "tools": [{**FUNCTION, "strict": True, "parameters": {"$ref": "#"}}]}],
            "tools.0.tools.0.parameters",
        ),
    ],
)
async def test_a_tool_that_is_none_is_named_by_its_place(refusal: Asking, tools: Any, param: str) -> None:
    assert (await refusal(tools=tools))[0] == param


@pytest.mark.parametrize(
    ("choice", "param"),
    [
        ("sometimes", "tool_choice"),
        ({"name": "f"}, "tool_choice"),
        ({"type": "web_search"}, "tool_choice"),
        ({"type": "local_shell"}, "tool_choice"),
        ({"type": "function", "name": "g"}, "tool_choice.name"),
        ({"type": "custom", "name": "f"}, "tool_choice.name"),
        ({"type": "allowed_tools", "mode": "never", "tools": []}, "tool_choice.mode"),
        ({"type": "allowed_tools", "mode": "auto"}, "tool_choice.tools"),
        ({"type": "allowed_tools", "tools": [{"type": "function", "name": "g"}]}, "tool_choice.tools.0.name"),
        ({"type": "allowed_tools", "mode": "required", "tools": [{"type": "web_search"}]}, "tool_choice"),
    ],
)
async def test_a_choice_that_cannot_be_kept_is_refused(refusal: Asking, choice: Any, param: str) -> None:
    assert (await refusal(tools=[FUNCTION, CUSTOM, *HOSTED], tool_choice=choice))[0] == param


async def test_a_call_is_not_demanded_where_nothing_can_be_called(refusal: Asking) -> None:
    assert (await refusal(tools=HOSTED, tool_choice="required"))[0] == "tool_choice"
    assert (await refusal(tool_choice="required"))[0] == "tool_choice"


async def test_a_name_within_namespaces_has_to_be_the_only_one(refusal: Asking, ask: Asking) -> None:
    other = {**SPACE, "name": "other"}
    choice = {"type": "function", "name": "f"}
    assert (await refusal(tools=[SPACE, other], tool_choice=choice))[0] == "tool_choice.name"
    response = await ask(tools=[SPACE, other], tool_choice={"type": "function", "name": "other__f"})
    assert response["tool_choice"] == choice


async def test_allowed_tools_are_those_that_are_offered(engine: ScriptedEngine, ask: Asking) -> None:
    choice = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "custom", "name": "patch"}, HOSTED[0]]}
    response = await ask(tools=[FUNCTION, CUSTOM], tool_choice=choice)
    assert [function["name"] for function in described(engine)] == ["patch"]
    assert response["tool_choice"] == choice
    assert response["tools"] == [FUNCTION, CUSTOM]


async def test_a_function_is_held_to_its_parameters_where_they_can_be_kept(engine: ScriptedEngine, ask: Asking) -> None:
    """OpenAI's default: strict where the schema allows it. A chat completion's is not to be strict."""
    silent = {key: value for key, value in FUNCTION.items() if key != "strict"}
    endless = {**silent, "name": "g", "parameters": {"$ref": "#"}}
    response = await ask(tools=[silent, endless, {**FUNCTION, "name": "h"}])
    assert [tool["strict"] for tool in response["tools"]] == [True, False, False]
    constraint = engine.params[-1].structured_outputs.structural_tag
    assert '"integer"' in constraint
    assert (await ask(tools=[FUNCTION]))["tools"] == [FUNCTION]
    free = engine.params[-1].structured_outputs
    assert free is None or '"integer"' not in str(free.structural_tag)


async def test_beside_a_format_a_call_stays_possible(engine: ScriptedEngine, ask: Asking) -> None:
    """The chat's grammar allows no call of a function that is held to nothing there."""
    form = {"format": {"type": "json_schema", "name": "n", "schema": {"enum": ["red"]}}}
    response = await ask(tools=[FUNCTION], text=form)
    assert [tool["strict"] for tool in response["tools"]] == [True]
    constraint = engine.params[-1].structured_outputs.structural_tag
    assert '"integer"' in constraint
    assert '"red"' in constraint


async def test_functions_that_cannot_be_kept_together_are_free(
    engine: ScriptedEngine, ask: Asking, refusal: Asking, trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the client has said that they are strict."""

    def verdict(kind: str, text: str, **_: Any) -> str | None:
        return "it takes more than 1 s to compile" if "tool_call" in text and "integer" in text else None

    monkeypatch.setattr(trial, "verdict", verdict)
    silent = {key: value for key, value in FUNCTION.items() if key != "strict"}
    assert [tool["strict"] for tool in (await ask(tools=[silent]))["tools"]] == [False]
    assert (await refusal(tools=[{**FUNCTION, "strict": True}]))[0] == "tools"


@pytest.mark.parametrize("text", ["", '*** Begin\n+é"\\\t\u2028😀</tool_call>', "{}"])
def test_an_input_comes_back_as_it_was_however_much_of_it_has_come(text: str) -> None:
    whole = encode_input(text)
    assert decode_input(whole) == text
    pieces = [decode_input(whole[:length]) or "" for length in range(len(whole) + 1)]
    assert all(text.startswith(piece) for piece in pieces)
    assert sorted(pieces, key=len) == pieces


@pytest.mark.parametrize(
    "arguments", ["", "*** Begin Patch", '{"input": 3}', '["input"]', '{"x": "y"}', '{"input": "\\ud800"}']
)
def test_what_is_no_input_is_none(arguments: str) -> None:
    assert decode_input(arguments) is None
