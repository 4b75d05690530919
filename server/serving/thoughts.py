"""The thought of an answer, told apart from the rest: the same whether it is streamed or sent whole.

Which tokens are the thought's is said by `server/engine/shared/thought.py`, as it is to grammar and budget; here the
text follows. Text comes later than its tokens (a stop string may hold it back), never before. What is behind the
thought goes to the parser of tool calls. Knows text and tokens, no single model.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from vllm.entrypoints.generate.base.protocol import DeltaMessage, FunctionCall
from vllm.parser import Parser
from vllm.parser.abstract_parser import DelegatingParser

from ultrafuser.server.engine.shared.thought import THOUGHT, Opening, Thought, ThoughtReader
from ultrafuser.server.serving.thinking import Markers


class Splitter:
    """Divides one answer."""

    def __init__(self, thought: Thought, markers: Markers, decode: Callable[[list[int]], str]) -> None:
        """`decode` gives the text of tokens, special ones included."""
        self._reader = ThoughtReader(thought)
        self._markers = markers
        self._decode = decode
        self._text = ""
        """All of the thought's text that has come, markers included, and what may be behind it."""

        self._num_told = 0
        """Characters of it that were told."""

        self._thought_ids: list[int] = []
        self._ended_by: int | None = None
        self._is_behind = False
        """Whether the text of the thought is complete."""

    @property
    def num_thought_tokens(self) -> int:
        """Tokens of the thought so far, markers apart."""
        return self._reader.num_thought

    def take(self, text: str, token_ids: Sequence[int], *, is_last: bool) -> tuple[str, str, list[int]]:
        """More of the answer: what is now told of the thought, and text and tokens of what is behind it."""
        behind = [token_id for token_id in token_ids if not self._read(token_id)]
        if self._is_behind:
            return "", text, behind
        self._text += text
        if not self._reader.num_read and not is_last:
            return "", "", behind
        if not self._thought_ids:
            self._is_behind = True
            return "", self._text, behind
        self._skip_start(is_last)
        told, rest = self._divide(is_last)
        return told, rest, behind

    def _read(self, token_id: int) -> bool:
        was_over = self._reader.is_over
        is_thought = self._reader.read(token_id)
        if is_thought:
            self._thought_ids.append(token_id)
        if self._reader.is_over and not was_over:
            self._ended_by = token_id
        return is_thought

    def _skip_start(self, is_last: bool) -> None:
        start = self._markers.start
        if self._num_told or self._thought_ids[0] != self._markers.start_id:
            return
        if self._text.startswith(start):
            self._num_told = len(start)

    def _divide(self, is_last: bool) -> tuple[str, str]:
        begin = self._num_told
        if begin == 0 and self._thought_ids[0] == self._markers.start_id and not is_last:
            return "", ""  # the marker's text is not here yet
        if not self._reader.is_over:
            self._num_told = len(self._text)
            return self._text[begin:], ""
        assert self._ended_by is not None
        end = self._markers.implicit_ends.get(self._ended_by, self._markers.end)
        place = self._place_of(end)
        if place is None:
            # Its text is held back, or a stop string has cut it off.
            self._num_told = len(self._text) - (0 if is_last else _num_begun(self._text[begin:], end))
            return self._text[begin : self._num_told], ""
        self._is_behind = True
        is_implicit = self._ended_by in self._markers.implicit_ends
        return self._text[begin:place], self._text[place if is_implicit else place + len(end) :]

    def _place_of(self, end: str) -> int | None:
        """Where the marker's text begins: behind those that the thought spells with other tokens."""
        ids = self._thought_ids if self._ended_by in self._markers.implicit_ends else self._thought_ids[:-1]
        place = -len(end)
        for _ in range(self._decode(ids).count(end) + 1):
            place = self._text.find(end, place + len(end))
            if place < 0:
                return None
        return place


def _num_begun(text: str, marker: str) -> int:
    """How many characters at the end of a text could begin the marker."""
    return next((length for length in range(len(marker) - 1, 0, -1) if text.endswith(marker[:length])), 0)


class _Thoughtful:
    """Put before a parser: it is given what is behind the thought."""

    markers: Markers
    model_tokenizer: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._splitter: Splitter | None = None
        self._num_reasoning_tokens = 0

    def parse_delta(
        self,
        delta_text: str,
        delta_token_ids: list[int],
        request: Any,
        prompt_token_ids: list[int] | None = None,
        *,
        finished: bool,
    ) -> DeltaMessage | None:
        """What the client is to be told after so much more text; None if nothing."""
        if self._splitter is None:
            self._splitter = Splitter(thought_in(request), self.markers, self._decode)
        told, text, token_ids = self._splitter.take(delta_text, delta_token_ids, is_last=finished)
        self._num_reasoning_tokens = self._splitter.num_thought_tokens
        delta = None
        if text or finished:
            delta = super().parse_delta(text, token_ids, request, [], finished=finished)  # type: ignore[misc]
        if told and request.include_reasoning:
            delta = delta or DeltaMessage()
            delta.reasoning = delta.reasoning_content = told
        return delta

    def parse(
        self,
        model_output: str,
        request: Any,
        enable_auto_tools: bool = False,
        model_output_token_ids: Sequence[int] = (),
    ) -> tuple[str | None, str | None, list[FunctionCall] | None]:
        """What the client would have been told by a stream."""
        thought = thought_in(request)
        splitter = Splitter(thought, self.markers, self._decode)
        told, text, token_ids = splitter.take(model_output, model_output_token_ids, is_last=True)
        # The other parser may read by deltas, of what is behind the thought.
        self._splitter = Splitter(replace(thought, opening="closed"), self.markers, self._decode)
        _, content, calls = super().parse(text, request, enable_auto_tools, token_ids)  # type: ignore[misc]
        self._num_reasoning_tokens = splitter.num_thought_tokens
        return told or None, content or None, calls

    def count_reasoning_tokens(self, token_ids: Sequence[int]) -> int:
        """Tokens of the thought of the answer that was read last."""
        return self._num_reasoning_tokens

    def _decode(self, token_ids: list[int]) -> str:
        return str(self.model_tokenizer.decode(token_ids, skip_special_tokens=False))


def thoughtful(parser: type[Parser] | None, markers: Markers) -> type[Parser]:
    """This parser, or one that finds no calls, behind a thought."""
    base = parser or DelegatingParser
    return type(f"{base.__name__}Thoughtful", (_Thoughtful, base), {"markers": markers})


def tell_apart(request: Any, opening: Opening, markers: Markers) -> None:
    """Have a chat request's thought told apart, by the parser and in the engine."""
    thought = markers.thought(opening, request.thinking_token_budget)
    request.thinking_token_budget = None  # vLLM's own way to keep it
    request.vllm_xargs = (request.vllm_xargs or {}) | {THOUGHT: thought.as_plain()}
    if markers.are_special:
        request.skip_special_tokens = False


def thought_in(request: Any) -> Thought:
    """The thought of a request for which `tell_apart` was called."""
    return Thought(**request.vllm_xargs[THOUGHT])
