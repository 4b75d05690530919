"""One response, out of the stream of a chat completion: its items, its events, its ends.

Events come in OpenAI's order: the response is created and in progress; each item is added, grows and is done; and the
last tells the whole response as completed, as incomplete where the limit cut it, or as failed. A whole answer is read
from the same stream. Of several calls in one turn each is an item of its own; one whose arguments are not complete
stays open, since a parser may still find their rest, at the end at the latest.
Knows the chat's events, no engine and no HTTP.
"""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator
from contextlib import aclosing, asynccontextmanager
from typing import Any, get_args

from openai import BaseModel
from openai.types.responses import (
    Response,
    ResponseCompletedEvent,
    ResponseCreatedEvent,
    ResponseFailedEvent,
    ResponseIncompleteEvent,
    ResponseInProgressEvent,
)

from ultrafuser.server.engine.shared.thought import Thought, ThoughtReader
from ultrafuser.server.errors import ApiError, sanitized
from ultrafuser.server.requests.mark_fields import MARK_FIELDS
from ultrafuser.server.serving.responses.output_items import (
    CustomCall,
    FunctionCall,
    GrowingItem,
    Message,
    Reasoning,
    Status,
    Telling,
)
from ultrafuser.server.serving.responses.toolbox import Toolbox

BEGIN_SECONDS = 1.0
"""How long the first event waits for the engine: what it refuses in this time is a status instead."""


class ResponseStream:
    """A response that is being written; read by `events` or by `whole`, once."""

    def __init__(
        self,
        shown: dict[str, Any],
        toolbox: Toolbox,
        chunks: AsyncGenerator[str, None],
        thought: Thought | None = None,
    ) -> None:
        """`shown` is what the response shows of its request; `chunks` are the chat completion's events; where its
        `thought` is told apart, they name their tokens if log probabilities were asked for."""
        self._thought = None if thought is None else ThoughtReader(thought)
        self._shown = shown
        self._toolbox = toolbox
        self._chunks = chunks
        self._items: list[GrowingItem] = []
        self._open: dict[int, GrowingItem] = {}  # by their index; the last one grows
        self._ended: dict[int, Status] = {}  # how the others have ended
        self._calls: dict[int, FunctionCall | CustomCall] = {}  # by the chat's number
        self._logprobs: list[dict[str, Any]] = []  # of tokens whose text has not come
        self._marks: dict[str, Any] = {}  # what is told of tokens, and the specialists' names
        self._new_marks: dict[str, list[Any]] = {}  # of tokens that no event has told yet
        self._finish_reason: str | None = None
        self._usage: dict[str, Any] | None = None
        self._number = 0

    async def events(self) -> AsyncGenerator[str, None]:
        """Server-sent events, up to the response's end.

        Raises:
            Exception: the chat has failed; `last_events` tells the client.
        """
        first = asyncio.ensure_future(anext(self._chunks))
        async with aclosing(self._chunks), _stopped(first):
            await asyncio.wait({first}, timeout=BEGIN_SECONDS)
            if not first.done():
                yield self._beginning()
            yield self._beginning() + self._written(self._take(await first))
            async for chunk in self._chunks:
                if told := self._written(self._take(chunk)):
                    yield told
        yield self._written(self._finish())

    async def whole(self) -> Response:
        """The response when it has ended."""
        async with aclosing(self._chunks):
            async for chunk in self._chunks:
                list(self._take(chunk))
        *_, (_, last) = self._finish()
        response: Response = last["response"]
        return response

    def last_events(self, error: ApiError) -> str:
        """The events that end the stream with an error: one that clients raise, and the response as it failed."""
        told = error.body()["error"]
        begun = self._beginning()
        frame = {**told, "type": "error", "sequence_number": self._next_number(), "error": told}
        code = "server_error" if error.status >= 500 else "invalid_prompt"
        failed = self._response("failed", error={"code": code, "message": sanitized(error.message)})
        return begun + _event(frame) + self._written([(ResponseFailedEvent, {"response": failed})])

    def _take(self, chunk: str) -> Iterator[Telling]:
        data = chunk.removeprefix("data: ").strip()
        if data == "[DONE]":
            return
        told: dict[str, Any] = json.loads(data)
        if "specialists" in told:
            self._marks["specialists"] = told["specialists"]
        if told.get("usage"):
            self._usage = told["usage"]
        for choice in told["choices"]:
            yield from self._take_choice(choice)

    def _take_choice(self, choice: dict[str, Any]) -> Iterator[Telling]:
        delta = choice["delta"]
        for entry in self._logprobs_in(choice):
            for told in (entry, *entry["top_logprobs"]):
                told["bytes"] = told.get("bytes") or []
            self._logprobs.append(entry)
        self._take_marks(choice)
        if thought := delta.get("reasoning"):
            yield from self._grow_thought(thought)
        if text := delta.get("content"):
            yield from self._grow_message(text)
        for call in delta.get("tool_calls") or ():
            yield from self._grow_call(call)
        self._finish_reason = choice.get("finish_reason") or self._finish_reason

    def _logprobs_in(self, choice: dict[str, Any]) -> list[dict[str, Any]]:
        """Log probabilities of tokens, but for a thought's: they are told of text."""
        entries: list[dict[str, Any]] = (choice.get("logprobs") or {}).get("content") or []
        if self._thought is None or not entries:
            return entries
        return [
            entry
            for entry, token_id in zip(entries, choice["token_ids"], strict=True)
            if not self._thought.read(token_id)
        ]

    def _take_marks(self, choice: dict[str, Any]) -> None:
        for name in MARK_FIELDS:
            if (own := choice.get(name)) is not None:
                marks = self._marks.setdefault(name, {"content": []})
                marks["content"] += own["content"]
                self._new_marks[name] = self._new_marks.get(name, []) + own["content"]
                if "mean" in own:
                    marks["mean"] = own["mean"]

    def _grow_thought(self, text: str) -> Iterator[Telling]:
        thought = self._items[-1] if self._items else None
        if not isinstance(thought, Reasoning):
            thought = Reasoning(len(self._items))
            yield from self._begin(thought)
        yield from thought.grow(text)

    def _grow_message(self, text: str) -> Iterator[Telling]:
        message = self._items[-1] if self._items else None
        if not isinstance(message, Message):
            message = Message(len(self._items))
            yield from self._begin(message)
        logprobs, self._logprobs = self._logprobs, []
        yield from message.grow(text, logprobs)

    def _grow_call(self, told: dict[str, Any]) -> Iterator[Telling]:
        function = told.get("function") or {}
        call = self._calls.get(told["index"])
        if call is None:
            flat = function.get("name") or ""
            tool = self._toolbox.called(flat)
            name, namespace = (tool.name, tool.namespace) if tool else (flat, None)
            kind = CustomCall if tool and tool.kind == "custom" else FunctionCall
            call = self._calls[told["index"]] = kind(len(self._items), told["id"], name, namespace)
            yield from self._begin(call)
        self._logprobs = []  # log probabilities are told of text
        yield from call.grow(function.get("arguments") or "")

    def _begin(self, item: GrowingItem) -> Iterator[Telling]:
        """A new item, before which the others end, but for a call that is not complete."""
        for other in [other for other in self._open.values() if other.is_whole]:
            yield from self._end(other, "completed")
        self._items.append(item)
        self._open[item.index] = item
        yield from item.begin()

    def _end(self, item: GrowingItem, status: Status) -> Iterator[Telling]:
        del self._open[item.index]
        self._ended[item.index] = status
        yield from item.end(status)

    def _finish(self) -> Iterator[Telling]:
        """The ends of all items, and of the response."""
        is_cut = self._finish_reason == "length"
        if not self._items or (isinstance(self._items[-1], Reasoning) and not is_cut):
            # An answer without a token is an empty text, which can be sent back.
            yield from self._begin(Message(len(self._items)))
        last = self._items[-1]
        for item in list(self._open.values()):
            is_complete = not is_cut or (item.is_whole and item is not last)
            yield from self._end(item, "completed" if is_complete else "incomplete")
        if is_cut:
            incomplete = self._response("incomplete", incomplete_details={"reason": "max_output_tokens"})
            yield ResponseIncompleteEvent, {"response": incomplete}
        else:
            completed = self._response("completed", completed_at=int(time.time()))
            yield ResponseCompletedEvent, {"response": completed}

    def _response(self, status: str, **told: Any) -> Response:
        """The response as it is now."""
        items = [item.item(self._ended.get(item.index, "incomplete")) for item in self._items]
        fields: dict[str, Any] = {"error": None, "incomplete_details": None, "completed_at": None, "usage": None}
        if status in ("completed", "incomplete"):
            fields |= {"usage": self._usage and _usage(self._usage), **self._marks}
        return Response.model_validate({**self._shown, **fields, "status": status, "output": items, **told})

    def _beginning(self) -> str:
        """What comes before all else; "" once it is told."""
        if self._number:
            return ""
        started = self._response("in_progress")
        return self._written(
            [(kind, {"response": started}) for kind in (ResponseCreatedEvent, ResponseInProgressEvent)]
        )

    def _written(self, tellings: Iterable[Telling]) -> str:
        return "".join([self._event(kind, fields) for kind, fields in tellings])

    def _event(self, kind: type[BaseModel], fields: dict[str, Any]) -> str:
        (name,) = get_args(kind.model_fields["type"].annotation)
        told = as_json(kind.model_validate({**fields, "type": name, "sequence_number": self._next_number()}))
        if "response" in told:
            told["response"] = as_json(fields["response"])
        if "delta" in told:
            told |= {name: {"content": marks} for name, marks in self._new_marks.items()}
            self._new_marks = {}
        return _event(told)

    def _next_number(self) -> int:
        self._number += 1
        return self._number - 1


@asynccontextmanager
async def _stopped(task: "asyncio.Task[str]") -> AsyncIterator[None]:
    """The task has stopped at the end, whoever leaves: a generator that runs cannot be closed."""
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})


def as_json(told: BaseModel) -> dict[str, Any]:
    """What is sent of an event or a response: only what was said of it, and times in whole seconds, as OpenAI sends
    them, whose type has them as fractions."""
    fields: dict[str, Any] = told.to_dict(mode="json")
    times = {name: int(fields[name]) for name in ("created_at", "completed_at") if fields.get(name) is not None}
    return fields | times


def _event(told: dict[str, Any]) -> str:
    return f"event: {told['type']}\ndata: {json.dumps(told, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _usage(usage: dict[str, Any]) -> dict[str, Any]:
    """The chat's usage in this API's words."""
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    reasoning = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": reasoning},
        "total_tokens": usage["total_tokens"],
    }
