"""The tools of a request: which of them are in force, what the chat calls them, and their names back.

In force are functions and custom tools, by themselves and in namespaces. To the chat all are functions: one in a
namespace goes by `namespace__name`, a custom tool, whose input is any text, takes an object with that text. Tools that
another server would run are accepted and not offered, as agents declare them always. Knows JSON, no templates.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jiter
from openai.types.responses import CustomTool, FunctionTool, NamespaceTool, Tool
from openai.types.responses.namespace_tool import ToolFunction
from vllm.tool_parsers.utils import CUSTOM_TOOL_INPUT_KEY, custom_tool_parameters, flat_namespace_tool_name

from ultrafuser.server.errors import InvalidRequest
from ultrafuser.server.requests.unsupported import refused

CALLABLE = ("function", "custom")

_FIELDS: Mapping[str, tuple[type, str]] = {
    "description": (str, "a string"),
    "parameters": (dict, "an object"),
    "strict": (bool, "true or false"),
    "format": (dict, "an object"),
}
"""What a tool says of itself beside its name."""


@dataclass(frozen=True)
class OfferedTool:
    """One tool that may be called."""

    place: str
    """Where it stands in the request, such as `tools.2`."""

    kind: str
    """`function` or `custom`."""

    namespace: str | None
    namespace_description: str
    name: str
    """As the client knows it, within its namespace."""

    description: str | None
    parameters: dict[str, Any] | None
    """Of a function."""

    strict: bool | None
    """Of a function: whether calls follow the parameters; None: the client has not said."""

    format: dict[str, Any] | None
    """Of a custom tool: what its input has to look like."""

    @property
    def flat(self) -> str:
        """Its name in the chat."""
        return flat_name(self.namespace, self.name)

    def for_chat(self, strict: bool | None) -> dict[str, Any]:
        """The function that the chat is offered."""
        function: dict[str, Any] = {"name": self.flat}
        description = self.description
        if self.kind == "custom":
            description, strict = _with_format(description, self.format), True
            function["parameters"] = custom_tool_parameters()
        elif self.parameters is not None:
            function["parameters"] = self.parameters
        if description is not None:
            function["description"] = description
        if strict is not None:
            function["strict"] = strict
        return {"type": "function", "function": function}


class Toolbox:
    """The tools in force, in the request's order."""

    def __init__(self, tools: Sequence[Any], items: str | Sequence[Any]) -> None:
        """`tools` are the request's; its items may bring more.

        Raises:
            InvalidRequest: a tool is none, or two go by one name; names its place.
        """
        self.tools: list[OfferedTool] = []
        for place, tool in _all_tools(tools, items):
            self.tools += _offered(place, tool)
        self._by_flat = {tool.flat: tool for tool in reversed(self.tools)}
        self.tools = [tool for tool in self.tools if not self._is_repeated(tool)]

    def _is_repeated(self, tool: OfferedTool) -> bool:
        """Whether the same tool stands earlier in the request: a search finds it again."""
        first = self._by_flat[tool.flat]
        if (first.kind, first.namespace, first.name) != (tool.kind, tool.namespace, tool.name):
            param = f"{tool.place}.name"
            raise InvalidRequest(f"{param}: {first.place} goes by the same name, {tool.flat[:64]!r}.", param)
        return first is not tool

    def called(self, flat: str) -> OfferedTool | None:
        """The tool of a name that the chat uses; None if the model has made it up."""
        return self._by_flat.get(flat)

    def named(self, place: str, choice: Mapping[str, Any]) -> OfferedTool:
        """The tool that a choice means.

        Raises:
            InvalidRequest: it is not in force, or several are; names the place.
        """
        kind, name, namespace = choice.get("type"), choice.get("name"), choice.get("namespace")
        own = [tool for tool in self.tools if tool.kind == kind and namespace in (None, tool.namespace)]
        found = [tool for tool in own if name == tool.flat] or [tool for tool in own if name == tool.name]
        if len(found) != 1:
            why = f"is the name of {len(found)} tools; say which namespace" if found else "is none of the tools"
            raise InvalidRequest(f"{place}.name: {str(name)[:64]!r} {why}.", f"{place}.name")
        return found[0]

    def echo(self, strict: Mapping[str, bool]) -> list[Tool]:
        """The tools in force as a response shows them; `strict` says of which functions calls follow the parameters."""
        shown: list[Tool] = []
        spaces: dict[str, NamespaceTool] = {}
        for tool in self.tools:
            told = _shown(tool, strict)
            if tool.namespace is None:
                shown.append(told)
                continue
            if tool.namespace not in spaces:
                space = NamespaceTool(
                    type="namespace", name=tool.namespace, description=tool.namespace_description, tools=[]
                )
                spaces[tool.namespace] = space
                shown.append(space)
            own = told if isinstance(told, CustomTool) else ToolFunction(**told.to_dict())  # type: ignore[arg-type]
            spaces[tool.namespace].tools.append(own)
        return shown


def flat_name(namespace: str | None, name: str) -> str:
    """What the chat calls a tool."""
    return flat_namespace_tool_name(namespace, name) if namespace else name


def encode_input(text: str) -> str:
    """The arguments by which a custom tool is called with this input."""
    return json.dumps({CUSTOM_TOOL_INPUT_KEY: text}, ensure_ascii=False)


def decode_input(arguments: str) -> str | None:
    """The input in arguments, as far as they have come; None where there is none (yet)."""
    try:
        value = jiter.from_json(arguments.encode(), partial_mode="trailing-strings")
    except ValueError:
        return None
    text = value.get(CUSTOM_TOOL_INPUT_KEY) if isinstance(value, dict) else None
    return text if isinstance(text, str) else None


def _all_tools(tools: Sequence[Any], items: str | Sequence[Any]) -> Iterator[tuple[str, Any]]:
    yield from ((f"tools.{index}", tool) for index, tool in enumerate(tools))
    for index, item in enumerate(() if isinstance(items, str) else items):
        if isinstance(item, dict) and item.get("type") in ("additional_tools", "tool_search_output"):
            place, found = f"input.{index}.tools", item.get("tools") or []
            if not isinstance(found, list):
                raise InvalidRequest(f"{place}: must be a list.", place)
            yield from ((f"{place}.{position}", tool) for position, tool in enumerate(found))


def _offered(place: str, tool: Any) -> Iterator[OfferedTool]:
    if not isinstance(tool, dict) or not isinstance(tool.get("type"), str):
        raise InvalidRequest(f"{place}.type: must say what kind of tool it is.", f"{place}.type")
    if tool["type"] in CALLABLE:
        yield _read(place, tool, None, "")
    if tool["type"] == "namespace":
        namespace, own = _text(place, tool, "name"), tool.get("tools") or []
        if not isinstance(own, list):
            raise InvalidRequest(f"{place}.tools: must be a list.", f"{place}.tools")
        for index, inner in enumerate(own):
            if isinstance(inner, dict) and inner.get("type") in CALLABLE:
                yield _read(f"{place}.tools.{index}", inner, namespace, str(tool.get("description") or ""))


def _read(place: str, tool: Mapping[str, Any], namespace: str | None, space: str) -> OfferedTool:
    if isinstance(tool.get("function"), dict) and tool.get("name") is None:
        raise refused(f"{place}.function", f"{place}.function: name and parameters stand in the tool itself.", "tools")
    name = _text(place, tool, "name")
    for key, (kind, must) in _FIELDS.items():
        if tool.get(key) is not None and not isinstance(tool[key], kind):
            raise InvalidRequest(f"{place}.{key}: must be {must}.", f"{place}.{key}")
    description, parameters, strict, form = map(tool.get, _FIELDS)
    if tool["type"] == "function":
        return OfferedTool(place, "function", namespace, space, name, description, parameters, strict, None)
    return OfferedTool(place, "custom", namespace, space, name, description, None, None, _format(place, form))


def _format(place: str, form: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What is known of a custom tool's format."""
    if form is None or form.get("type") == "text":
        return None if form is None else {"type": "text"}
    if form.get("type") != "grammar" or form.get("syntax") not in ("lark", "regex"):
        raise InvalidRequest(f"{place}.format: must be text, or a grammar in lark or regex.", f"{place}.format")
    return {"type": "grammar", "syntax": form["syntax"], "definition": _text(f"{place}.format", form, "definition")}


def _with_format(description: str | None, form: Mapping[str, Any] | None) -> str | None:
    if form is None or form["type"] == "text":
        return description
    told = f"The input follows this grammar ({form['syntax']}):\n{form['definition']}"
    return f"{description}\n\n{told}" if description else told


def _shown(tool: OfferedTool, strict: Mapping[str, bool]) -> FunctionTool | CustomTool:
    if tool.kind == "custom":
        own = {"format": tool.format} if tool.format else {}
        return CustomTool(type="custom", name=tool.name, description=tool.description, **own)  # type: ignore[arg-type]
    return FunctionTool(
        type="function",
        name=tool.name,
        description=tool.description,
        parameters=tool.parameters,
        strict=strict.get(tool.flat, tool.strict),
    )


def _text(place: str, tool: Mapping[str, Any], key: str) -> str:
    value = tool.get(key)
    if not isinstance(value, str) or not value:
        raise InvalidRequest(f"{place}.{key}: must be a string.", f"{place}.{key}")
    return value
