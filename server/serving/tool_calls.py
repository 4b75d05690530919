"""Text and tool calls out of an answer: the same whether it is streamed or sent whole.

vLLM's parsers read an answer in two ways, as it grows and at its end. The two differ where an answer is cut off or ends
within a marker, and the first depends on how the text was cut into deltas. Here one reading serves both: as it grows, a
character at a time, and what this has not told at the end (text that could have begun a marker, the rest of arguments)
is taken from the other reading. Knows no single parser.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from vllm.entrypoints.generate.base.protocol import DeltaMessage, FunctionCall
from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionNamedToolChoiceParam,
    ChatCompletionRequest,
    ChatCompletionResponseChoice,
)
from vllm.outputs import CompletionOutput
from vllm.parser import Parser

from ultrafuser.server.serving.constraints import demands_call
from ultrafuser.server.serving.told import Told, joined

MAX_READ_ALIKE = 8192
"""Characters of an answer beyond which its parser reads it in its own two ways: parsers look through all of the text
for each piece, and a whole answer is read in the event loop, where everybody waits."""

logger = logging.getLogger(__name__)


class Spellings:
    """A text's pieces that parsers are given: characters, and tokens that were added to the vocabulary as a whole.

    Some parsers know their markers by the token's id only.
    """

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer` is a Transformers tokenizer."""
        self.token_ids = {token.content: token_id for token_id, token in tokenizer.added_tokens_decoder.items()}
        self._beginnings = {text[:length] for text in self.token_ids for length in range(1, len(text))}
        self._longest = max(map(len, self.token_ids), default=0)

    def split(self, text: str, is_last: bool) -> Iterator[str]:
        """The pieces, one after the other, but for a tail that could become an added token."""
        position = 0
        while position < len(text):
            rest = text[position : position + self._longest]
            if not is_last and len(rest) == len(text) - position and rest in self._beginnings:
                return
            token = next((rest[:length] for length in range(len(rest), 1, -1) if rest[:length] in self.token_ids), "")
            piece = token or text[position]
            position += len(piece)
            yield piece


class _ReadAlike:
    """Put before one of vLLM's parsers: both of its ways to be asked give the same answer."""

    base: type[Parser]
    spellings: Spellings
    tool_parser: Any
    _engine_based: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._other = lambda: self.base(*args, **kwargs)
        self._told = Told()
        self._text, self._unread = "", ""
        self._token_ids: list[int] = []

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
        if self._is_plain(request):
            return super().parse_delta(delta_text, delta_token_ids, request, prompt_token_ids, finished=finished)  # type: ignore[misc]
        self._text += delta_text
        self._token_ids += delta_token_ids
        self._unread += delta_text
        if len(self._text) > MAX_READ_ALIKE:
            deltas = [self._read(self._unread, delta_token_ids, request, finished=False)]
            self._unread = ""
        else:
            deltas = [self._read(*piece, request, finished=False) for piece in self._pieces(finished)]
        if finished:
            deltas.append(self._read("", [], request, finished=True))
            deltas.append(self._told.take(self._missing(request)))
        delta = joined(deltas)
        return delta if delta.content or delta.reasoning or delta.tool_calls else None

    def parse(
        self,
        model_output: str,
        request: Any,
        enable_auto_tools: bool = False,
        model_output_token_ids: Sequence[int] = (),
    ) -> tuple[str | None, str | None, list[FunctionCall] | None]:
        """What the client would have been told by a stream."""
        if self._is_plain(request):
            return None, model_output, []
        if len(model_output) > MAX_READ_ALIKE:
            read = super().parse(model_output, request, enable_auto_tools, model_output_token_ids)  # type: ignore[misc]
            reasoning, content, calls = read
            return reasoning, None if _is_bound_to_call(request) and not calls else content, calls
        self.parse_delta(model_output, list(model_output_token_ids), request, finished=True)
        told = self._told
        calls = [FunctionCall(id=call.id, name=call.name, arguments=call.arguments) for call in told.calls]
        return told.reasoning or None, told.content or None, calls

    def extract_tool_calls_streaming(self, *args: Any) -> DeltaMessage | None:
        """As vLLM's, but not counted: its metric is to count the other reading, once an answer."""
        return self.tool_parser.extract_tool_calls_streaming(*args)

    def _is_plain(self, request: Any) -> bool:
        """Whether the answer is its text, in which nothing is looked for."""
        return request.tool_choice == "none" and not self._engine_based

    def _pieces(self, is_last: bool) -> list[tuple[str, list[int]]]:
        """What can be read, with the ids of added tokens; the rest is kept."""
        pieces = list(self.spellings.split(self._unread, is_last))
        self._unread = self._unread[sum(map(len, pieces)) :]
        known = self.spellings.token_ids
        return [(piece, [known[piece]] if piece in known else []) for piece in pieces]

    def _read(self, piece: str, token_ids: list[int], request: Any, *, finished: bool) -> DeltaMessage:
        try:
            # Whether the prompt ends within reasoning is asked of reasoning parsers, of which there are none.
            delta = super().parse_delta(piece, token_ids, request, [], finished=finished)  # type: ignore[misc]
            return self._told.take(_without_beginning(delta, request) if finished else delta)
        except Exception:  # a parser that fails on what the model has written is no reason to lose it
            logger.debug("the tool call parser failed", exc_info=True)
            return DeltaMessage()

    def _missing(self, request: Any) -> DeltaMessage | None:
        try:
            _, content, calls = self._other().parse(
                self._text, request, enable_auto_tools=True, model_output_token_ids=self._token_ids
            )
        except Exception:  # as above
            logger.debug("the tool call parser failed", exc_info=True)
            content, calls = self._text, []
        return _without_beginning(self._told.missing(content or "", calls or []), request)


def _is_bound_to_call(request: Any) -> bool:
    """Whether the answer can only begin with a call, in the form that its parser reads."""
    bound = request.structured_outputs
    return demands_call(request) and bound is not None and bound.structural_tag is not None


def _without_beginning(delta: DeltaMessage | None, request: Any) -> DeltaMessage | None:
    """What an answer's end adds, but for text that was held back as the beginning of a call that is demanded."""
    if delta is not None and _is_bound_to_call(request):
        delta.content = None
    return delta


def read_alike(parser: type[Parser], tokenizer: Any) -> type[Parser]:
    """This parser, with answers that are equal in a stream and whole, however the stream is cut into deltas."""
    return type(
        f"{parser.__name__}ReadAlike", (_ReadAlike, parser), {"base": parser, "spellings": Spellings(tokenizer)}
    )


def finish_reason(
    request: ChatCompletionRequest, choice: ChatCompletionResponseChoice, output: CompletionOutput
) -> str:
    """Why a whole answer ended, as vLLM says it in a stream: a call that was cut off ended by its length."""
    is_named = isinstance(request.tool_choice, ChatCompletionNamedToolChoiceParam)
    if choice.message.tool_calls and not is_named and output.finish_reason == "stop":
        return "tool_calls"
    return output.finish_reason or "stop"
