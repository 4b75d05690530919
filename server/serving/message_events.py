"""The stream of /v1/messages: what the events of a chat completion say, as blocks that begin, grow and end one by one.

It begins within a second, whether there is a token or not, and ends with `message_stop`, unless an error ends it
(`server/dialects.py`). Knows no routes.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, suppress
from typing import Any

from vllm.entrypoints.serve.engine.protocol import PromptTokenUsageInfo, UsageInfo
from vllm.outputs import RequestOutput

from ultrafuser.server.requests.mark_fields import MARK_FIELDS
from ultrafuser.server.serving.message_answers import SIGNATURE, event, is_complete, message_id, stop_of, usage_of

START_SECONDS = 1.0
"""How long the first event waits for the engine, which knows how much of the prompt it has in its cache.

As long as a response waits for its status; then clients are to see that they are heard."""


class MessageEvents:
    """One stream: chat events go in, Anthropic's come out."""

    def __init__(self, request_id: str, model: str, prompt_tokens: int, asked_tokens: int) -> None:
        """`prompt_tokens` is the length of the prompt, `asked_tokens` the client's `max_tokens`."""
        self._head = {"id": message_id(request_id), "type": "message", "role": "assistant", "model": model}
        self._usage = UsageInfo(prompt_tokens=prompt_tokens, completion_tokens=0)
        self._asked_tokens = asked_tokens
        self._blocks = _Blocks()
        self._finish_reason: str | None = None
        self._matched: int | str | None = None
        self._marks: dict[str, dict[str, Any]] = {}

    async def watch(self, outputs: AsyncIterator[RequestOutput]) -> AsyncGenerator[RequestOutput, None]:
        """Pass the engine's outputs on; the first says what was cached."""
        is_first = True
        async for output in outputs:
            if is_first:
                read, created = output.num_cached_tokens, output.num_cache_creation_tokens
                self._usage.prompt_tokens_details = PromptTokenUsageInfo(
                    cached_tokens=read, created_cache_tokens=created
                )
                is_first = False
            yield output

    async def of(self, chunks: AsyncGenerator[str, None], **head: Any) -> AsyncGenerator[str, None]:
        """The events of a chat completion's stream; `head` is what else the message has.

        Raises:
            Exception: whatever the stream raises; then there is no end.
        """
        async with aclosing(chunks):
            first = asyncio.ensure_future(anext(chunks))
            try:
                await asyncio.wait({first}, timeout=START_SECONDS)
                if first.done():
                    first.result()
                yield self._start(head)
                await first  # has a role and no text
            finally:
                first.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await first
            async for chunk in chunks:
                data = chunk.removeprefix("data: ").strip()
                if data != "[DONE]":
                    for own in self._read(json.loads(data)):
                        yield own
        for own in self._end():
            yield own

    def _start(self, head: dict[str, Any]) -> str:
        told = {"content": [], "stop_reason": None, "stop_sequence": None, "usage": usage_of(self._usage).model_dump()}
        return event("message_start", message=self._head | told | head)

    def _read(self, chunk: dict[str, Any]) -> Iterator[str]:
        if chunk.get("usage"):
            self._usage = UsageInfo.model_validate(chunk["usage"])
        for choice in chunk["choices"]:
            self._finish_reason = choice.get("finish_reason") or self._finish_reason
            self._matched = choice.get("stop_reason") or self._matched
            for name in MARK_FIELDS:
                if name in choice:
                    self._keep_marks(name, choice[name])
            for kind, data in self._blocks.grow(choice["delta"]):
                if kind == "content_block_delta":
                    data |= self._marks
                    self._marks = {}
                yield event(kind, **data)

    def _keep_marks(self, name: str, marks: dict[str, Any]) -> None:
        kept = self._marks.setdefault(name, {"content": []})
        kept |= marks | {"content": kept["content"] + marks["content"]}

    def _end(self) -> Iterator[str]:
        for kind, data in self._blocks.end():
            yield event(kind, **data)
        reason, sequence = stop_of(
            self._finish_reason, self._matched, self._blocks.calls, self._usage, self._asked_tokens
        )
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        yield event("message_delta", delta=delta, usage=usage_of(self._usage).model_dump(), **self._marks)
        yield event("message_stop")


_Told = Iterator[tuple[str, dict[str, Any]]]
"""Kinds of events, and what is in them."""


class _Blocks:
    """The blocks of one message, of which only the last is open."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        """The arguments of each call, as far as they were told."""

        self._number = -1
        self._is_open = False
        self._is_thought = False  # whether the open one is a thought
        self._call: int | None = None  # the chat's number of the call that is open
        self._held = ""  # text that came within a call
        self._waiting: list[dict[str, Any]] = []  # what came of later calls meanwhile

    def grow(self, delta: dict[str, Any]) -> _Told:
        """What a chat's delta adds."""
        if thought := delta.get("reasoning"):
            yield from self._grow_thought(thought)
        calls = delta.get("tool_calls") or []
        for call in calls:
            if call["index"] == self._call:
                yield from self._grow_call(call)
        if text := delta.get("content"):
            yield from self._grow_text(text)
        self._waiting += [call for call in calls if call["index"] != self._call]
        yield from self._take_waiting(is_last=False)

    def _take_waiting(self, *, is_last: bool) -> _Told:
        """What is told of further calls, each once the one before it is complete: only one block is open at a time."""
        while self._waiting and (self._call is None or is_complete(self.calls[-1]) or is_last):
            number = self._waiting[0]["index"]
            own = [call for call in self._waiting if call["index"] == number]
            self._waiting = [call for call in self._waiting if call["index"] != number]
            for call in own:
                if call["index"] == self._call:
                    yield from self._grow_call(call)
                elif (call.get("function") or {}).get("name"):
                    yield from self._begin_call(call)

    def end(self) -> _Told:
        """The end of the last block; an answer that has none gets an empty one, for clients that look at the first."""
        yield from self._take_waiting(is_last=True)
        yield from self._close()
        if self._number < 0:
            yield from self._begin({"type": "text", "text": ""})
            yield from self._close()

    def _grow_thought(self, text: str) -> _Told:
        if not self._is_open:
            self._is_thought = True
            yield from self._begin({"type": "thinking", "thinking": "", "signature": ""})
        yield self._delta({"type": "thinking_delta", "thinking": text})

    def _grow_text(self, text: str) -> _Told:
        if self._is_thought:
            yield from self._stop()
        if self._call is not None:
            self._held += text
            if is_complete(self.calls[-1]):
                yield from self._close_call()
            return
        if not self._is_open:
            yield from self._begin({"type": "text", "text": ""})
        yield self._delta({"type": "text_delta", "text": text})

    def _begin_call(self, call: dict[str, Any]) -> _Told:
        yield from self._close()
        self._call = call["index"]
        self.calls.append("")
        yield from self._begin({"type": "tool_use", "id": call["id"], "name": call["function"]["name"], "input": {}})
        yield from self._grow_call(call)

    def _grow_call(self, call: dict[str, Any]) -> _Told:
        if arguments := (call.get("function") or {}).get("arguments"):
            self.calls[-1] += arguments
            yield self._delta({"type": "input_json_delta", "partial_json": arguments})

    def _close(self) -> _Told:
        yield from self._close_call()
        yield from self._stop()

    def _close_call(self) -> _Told:
        """End a call; then comes the text that did not belong into it."""
        if self._call is None:
            return
        self._call = None
        yield from self._stop()
        held, self._held = self._held, ""
        if held:
            yield from self._grow_text(held)

    def _begin(self, block: dict[str, Any]) -> _Told:
        self._number += 1
        self._is_open = True
        yield "content_block_start", {"index": self._number, "content_block": block}

    def _delta(self, delta: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        return "content_block_delta", {"index": self._number, "delta": delta}

    def _stop(self) -> _Told:
        if self._is_thought:
            self._is_thought = False
            yield self._delta({"type": "signature_delta", "signature": SIGNATURE})
        if self._is_open:
            self._is_open = False
            yield "content_block_stop", {"index": self._number}
