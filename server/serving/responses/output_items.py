"""Output items as they grow: a thought, a message, a call of a function, a call of a custom tool.

Each knows what to tell of its beginning, its growth and its end: an event's class and fields, to which
`response_stream.py` gives numbers. Knows no chat and no tools.
"""

import json
from collections.abc import Iterator
from typing import Any, Literal, Protocol
from uuid import uuid4

from openai import BaseModel
from openai.types.responses import (
    ResponseContentPartAddedEvent,
    ResponseContentPartDoneEvent,
    ResponseCustomToolCall,
    ResponseCustomToolCallInputDeltaEvent,
    ResponseCustomToolCallInputDoneEvent,
    ResponseFunctionCallArgumentsDeltaEvent,
    ResponseFunctionCallArgumentsDoneEvent,
    ResponseFunctionToolCall,
    ResponseOutputItem,
    ResponseOutputItemAddedEvent,
    ResponseOutputItemDoneEvent,
    ResponseOutputMessage,
    ResponseOutputText,
    ResponseReasoningItem,
    ResponseReasoningTextDeltaEvent,
    ResponseReasoningTextDoneEvent,
    ResponseTextDeltaEvent,
    ResponseTextDoneEvent,
)

from ultrafuser.server.serving.responses.toolbox import decode_input

Status = Literal["in_progress", "completed", "incomplete"]
Telling = tuple[type[BaseModel], dict[str, Any]]
"""An event's class, and its fields but for those that every event has."""


class GrowingItem(Protocol):
    """One item of a response that is being written."""

    index: int
    """Its place in the response's output."""

    def item(self, status: Status) -> ResponseOutputItem:
        """The item, as far as it has grown."""

    def begin(self) -> Iterator[Telling]:
        """That it is there."""

    def end(self, status: Status) -> Iterator[Telling]:
        """That it grows no more."""

    @property
    def is_whole(self) -> bool:
        """Whether nothing can follow that belongs to it."""


class _Item:
    """What every item has."""

    def __init__(self, index: int, prefix: str) -> None:
        self.index = index
        self.id = f"{prefix}_{uuid4().hex}"

    @property
    def place(self) -> dict[str, Any]:
        return {"item_id": self.id, "output_index": self.index}


class Message(_Item):
    """Text for the user, in one part."""

    is_whole = True

    def __init__(self, index: int) -> None:
        super().__init__(index, "msg")
        self._text = ""
        self._logprobs: list[dict[str, Any]] = []

    def item(self, status: Status) -> ResponseOutputItem:
        content: list[Any] = [] if status == "in_progress" and not self._text else [self._part()]
        return ResponseOutputMessage(id=self.id, type="message", role="assistant", status=status, content=content)

    def begin(self) -> Iterator[Telling]:
        yield ResponseOutputItemAddedEvent, {"item": self.item("in_progress"), "output_index": self.index}
        yield ResponseContentPartAddedEvent, {**self._place, "part": self._part()}

    def grow(self, text: str, logprobs: list[dict[str, Any]]) -> Iterator[Telling]:
        """More text, and the log probabilities of its tokens if they were asked for."""
        self._text += text
        self._logprobs += logprobs
        if text:
            yield ResponseTextDeltaEvent, {**self._place, "delta": text, "logprobs": logprobs}

    def end(self, status: Status) -> Iterator[Telling]:
        yield ResponseTextDoneEvent, {**self._place, "text": self._text, "logprobs": self._logprobs}
        yield ResponseContentPartDoneEvent, {**self._place, "part": self._part()}
        yield ResponseOutputItemDoneEvent, {"item": self.item(status), "output_index": self.index}

    @property
    def _place(self) -> dict[str, Any]:
        return {**self.place, "content_index": 0}

    def _part(self) -> ResponseOutputText:
        logprobs: Any = self._logprobs
        return ResponseOutputText(type="output_text", text=self._text, annotations=[], logprobs=logprobs)


class Reasoning(_Item):
    """A thought, in one part; nothing of it is summed up or sealed."""

    is_whole = True

    def __init__(self, index: int) -> None:
        super().__init__(index, "rs")
        self._text = ""

    def item(self, status: Status) -> ResponseOutputItem:
        content: list[Any] = [{"type": "reasoning_text", "text": self._text}] if self._text else []
        return ResponseReasoningItem(id=self.id, type="reasoning", summary=[], content=content, status=status)

    def begin(self) -> Iterator[Telling]:
        yield ResponseOutputItemAddedEvent, {"item": self.item("in_progress"), "output_index": self.index}

    def grow(self, text: str) -> Iterator[Telling]:
        """More of the thought."""
        self._text += text
        yield ResponseReasoningTextDeltaEvent, {**self.place, "content_index": 0, "delta": text}

    def end(self, status: Status) -> Iterator[Telling]:
        yield ResponseReasoningTextDoneEvent, {**self.place, "content_index": 0, "text": self._text}
        yield ResponseOutputItemDoneEvent, {"item": self.item(status), "output_index": self.index}


class _Call(_Item):
    """A call, whose arguments come as JSON in pieces."""

    def __init__(self, index: int, prefix: str, call_id: str, name: str, namespace: str | None) -> None:
        super().__init__(index, prefix)
        self._named: dict[str, Any] = {"call_id": call_id, "name": name}
        if namespace is not None:
            self._named["namespace"] = namespace
        self._arguments = ""

    @property
    def is_whole(self) -> bool:
        try:
            return isinstance(json.loads(self._arguments), dict)
        except (ValueError, RecursionError):
            return False

    def begin(self) -> Iterator[Telling]:
        yield ResponseOutputItemAddedEvent, {"item": self.item("in_progress"), "output_index": self.index}

    def item(self, status: Status) -> ResponseOutputItem:
        raise NotImplementedError


class FunctionCall(_Call):
    """A call of a function, by its arguments."""

    def __init__(self, index: int, call_id: str, name: str, namespace: str | None) -> None:
        super().__init__(index, "fc", call_id, name, namespace)

    def item(self, status: Status) -> ResponseOutputItem:
        own = {**self._named, "arguments": self._arguments, "status": status}
        return ResponseFunctionToolCall(id=self.id, type="function_call", **own)

    def grow(self, arguments: str) -> Iterator[Telling]:
        """More of the arguments."""
        self._arguments += arguments
        if arguments:
            yield ResponseFunctionCallArgumentsDeltaEvent, {**self.place, "delta": arguments}

    def end(self, status: Status) -> Iterator[Telling]:
        own = {"arguments": self._arguments, "name": self._named["name"]}
        yield ResponseFunctionCallArgumentsDoneEvent, {**self.place, **own}
        yield ResponseOutputItemDoneEvent, {"item": self.item(status), "output_index": self.index}


class CustomCall(_Call):
    """A call of a custom tool, by its input, which is a string within the arguments."""

    def __init__(self, index: int, call_id: str, name: str, namespace: str | None) -> None:
        super().__init__(index, "ctc", call_id, name, namespace)
        self._input = ""

    def item(self, status: Status) -> ResponseOutputItem:
        own = {**self._named, "input": self._input, "status": status}
        return ResponseCustomToolCall(id=self.id, type="custom_tool_call", **own)

    def grow(self, arguments: str) -> Iterator[Telling]:
        """More of the arguments, which may tell more of the input."""
        self._arguments += arguments
        told = decode_input(self._arguments) or ""
        if len(told) > len(self._input) and told.startswith(self._input):
            delta, self._input = told[len(self._input) :], told
            yield ResponseCustomToolCallInputDeltaEvent, {**self.place, "delta": delta}

    def end(self, status: Status) -> Iterator[Telling]:
        if not self._input and self._arguments and decode_input(self._arguments) is None:
            self._input = self._arguments  # a model that is held to nothing wrote something else
            yield ResponseCustomToolCallInputDeltaEvent, {**self.place, "delta": self._input}
        yield ResponseCustomToolCallInputDoneEvent, {**self.place, "input": self._input}
        yield ResponseOutputItemDoneEvent, {"item": self.item(status), "output_index": self.index}
