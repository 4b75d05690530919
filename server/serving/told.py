"""What a client was told of an answer, delta by delta: text, and tool calls. Knows no parser."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from vllm.entrypoints.generate.base.protocol import DeltaFunctionCall, DeltaMessage, DeltaToolCall, FunctionCall
from vllm.renderers.chat_utils import make_tool_call_id


@dataclass
class ToldCall:
    """One tool call, as far as it was told."""

    id: str | None = None
    name: str = ""
    arguments: str = ""
    _depth: int = 0
    _is_in_string: bool = False
    _is_escaped: bool = False
    _is_over: bool = False

    def take(self, text: str) -> str:
        """More of the arguments; returns what belongs to them: what follows the end of their object does not."""
        length = 0
        while length < len(text) and not self._is_over:
            self._look_at(text[length])
            length += 1
        self.arguments += text[:length]
        return text[:length]

    def _look_at(self, character: str) -> None:
        if self._is_in_string:
            self._is_in_string = self._is_escaped or character != '"'
            self._is_escaped = not self._is_escaped and character == "\\"
        elif character == '"':
            self._is_in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            self._is_over = self._depth <= 0

    def is_continued_by(self, call: FunctionCall) -> bool:
        """Whether this is the same call, or its beginning."""
        if call.name != self.name:
            return False
        return call.arguments.startswith(self.arguments) or _is_same_json(call.arguments, self.arguments)


@dataclass
class Told:
    """One answer, as far as it was told."""

    reasoning: str = ""
    content: str = ""
    _calls: dict[int, ToldCall] = field(default_factory=dict)

    @property
    def calls(self) -> list[ToldCall]:
        return [self._calls[index] for index in sorted(self._calls)]

    def take(self, delta: DeltaMessage | None) -> DeltaMessage:
        """One more delta; returns what of it is to be told."""
        if delta is None:
            return DeltaMessage()
        self.reasoning += delta.reasoning or ""
        self.content += delta.content or ""
        delta.tool_calls = [call for call in delta.tool_calls or () if self._take_call(call)]
        return delta

    def _take_call(self, delta: DeltaToolCall) -> bool:
        call = self._calls.setdefault(delta.index, ToldCall())
        call.id = call.id or delta.id
        if delta.function is None:
            return delta.id is not None
        call.name += delta.function.name or ""
        if delta.function.arguments is not None:
            delta.function.arguments = call.take(delta.function.arguments)
        return bool(delta.id or delta.function.name or delta.function.arguments)

    def missing(self, content: str, calls: Sequence[FunctionCall]) -> DeltaMessage:
        """What a reading of the whole answer has beyond this one; nothing if it is another answer's beginning."""
        told = self.calls
        if len(calls) < len(told) or not all(map(ToldCall.is_continued_by, told, calls)):
            return DeltaMessage()
        rest = content.removeprefix(self.content) if content.startswith(self.content) else ""
        deltas = [
            DeltaToolCall(index=index, function=DeltaFunctionCall(arguments=call.arguments[len(own.arguments) :]))
            for (index, own), call in zip(sorted(self._calls.items()), calls, strict=False)
            if call.arguments.startswith(own.arguments) and call.arguments != own.arguments
        ]
        first = max(self._calls, default=-1) + 1
        deltas += [_begun(index, call) for index, call in enumerate(calls[len(told) :], first)]
        return DeltaMessage(content=rest or None, tool_calls=deltas)


def _begun(index: int, call: FunctionCall) -> DeltaToolCall:
    function = DeltaFunctionCall(name=call.name, arguments=call.arguments)
    return DeltaToolCall(index=index, id=call.id or make_tool_call_id(), type="function", function=function)


def joined(deltas: Iterable[DeltaMessage]) -> DeltaMessage:
    """Deltas that follow each other, as one."""
    reasoning, content = "", ""
    calls: list[DeltaToolCall] = []
    for delta in deltas:
        reasoning += delta.reasoning or ""
        content += delta.content or ""
        for call in delta.tool_calls:
            _append(calls, call)
    told = {"reasoning": reasoning, "content": content, "tool_calls": calls}
    return DeltaMessage(**{name: value for name, value in told.items() if value})  # what is not set is not sent


def _append(calls: list[DeltaToolCall], call: DeltaToolCall) -> None:
    last = calls[-1] if calls else None
    if last is None or last.index != call.index or not last.function or not call.function or call.function.name:
        calls.append(call)
    else:
        last.function.arguments = (last.function.arguments or "") + (call.function.arguments or "")


def _is_same_json(text: str, other: str) -> bool:
    try:
        return bool(json.loads(text) == json.loads(other))
    except (ValueError, RecursionError):
        return False
