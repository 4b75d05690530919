"""How a thinking model's thoughts are told apart: by which markers, and how each prompt leaves them.

The markers are those of one of vLLM's reasoning parsers. What a prompt leaves - a thought opened, ended, or up to the
model - is read from what a template writes where the response begins, never from what a conversation says. All
specialists have to agree whether a thought is open, for they go on with the same tokens; that is found out at the start
for every setting that templates know, and again for each request. Knows templates and text, no parser of answers.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from jinja2 import TemplateError
from vllm.reasoning import ReasoningParserManager
from vllm.tokenizers import get_tokenizer

from ultrafuser.gating.model.fusion import FusedModelInfo, FusionConfig
from ultrafuser.server.engine.shared.thought import Opening, Thought
from ultrafuser.server.errors import InvalidRequest
from ultrafuser.server.requests.thinking_fields import EFFORTS, switches
from ultrafuser.server.settings import SettingsError

_PROBE = [{"role": "user", "content": "Hi"}]
_MAX_SETTINGS = 256
"""How many settings of templates are remembered."""

SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    switches(is_on=True),
    switches(is_on=False),
    *({"reasoning_effort": effort, **switches(is_on=effort != "none")} for effort in EFFORTS),
)
"""What requests may ask of templates; `chat_template_kwargs` can hold more, which shows when it is asked for."""


class ThinkingError(SettingsError):
    """Thoughts of these specialists cannot be told apart; the message names what to change."""


@dataclass(frozen=True)
class Markers:
    """What opens and ends a thought, as text and as tokens that all specialists share."""

    start: str
    end: str
    start_id: int
    end_id: int
    implicit_ends: Mapping[int, str]
    """Tokens that end a thought by being the answer's first."""

    are_special: bool
    """Whether a text leaves them out unless it is asked for all."""

    def thought(self, opening: Opening, budget: int | None) -> Thought:
        """For a request whose prompt leaves this opening."""
        return Thought(opening, self.start_id, self.end_id, tuple(self.implicit_ends), budget)

    def opening_after(self, text: str) -> Opening:
        """What a text leaves that begins with the assistant's turn."""
        start, end = text.rfind(self.start), text.rfind(self.end)
        if start == end == -1:
            return "unopened"
        return "open" if start > end else "closed"


def markers_of(name: str, tokenizer: Any, num_shared_ids: int) -> Markers:
    """The markers of one of vLLM's reasoning parsers; `tokenizer` is the leader's, a Transformers tokenizer.

    Raises:
        ThinkingError: no such parser, or its markers are not one token each that all specialists share.
    """
    try:
        parser = ReasoningParserManager.get_reasoning_parser(name)(tokenizer)
    except KeyError:
        known = ", ".join(ReasoningParserManager.list_registered())
        raise ThinkingError(f"reasoning_parser: vLLM has no parser {name!r}; it has {known}") from None
    except (RuntimeError, ValueError, TypeError) as error:
        raise ThinkingError(
            f"reasoning_parser: {name!r} does not go with the specialists' tokenizer ({error}); choose another"
        ) from error
    start, end = parser.reasoning_start_str, parser.reasoning_end_str
    if not start or not end:
        raise ThinkingError(f"reasoning_parser: {name!r} has no markers around a thought; choose one that has")
    vocabulary = tokenizer.get_vocab()
    for text in (start, end):
        if vocabulary.get(text, num_shared_ids) >= num_shared_ids:
            raise ThinkingError(
                f"reasoning_parser: {text!r} of {name!r} is not a token that all specialists share; choose another "
                "parser, or leave it out"
            )
    implicit = sorted(getattr(parser, "reasoning_end_token_ids", frozenset()) - {vocabulary[end]})
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return Markers(
        start=start,
        end=end,
        start_id=vocabulary[start],
        end_id=vocabulary[end],
        implicit_ends={token_id: tokenizer.convert_ids_to_tokens(token_id) for token_id in implicit},
        are_special=bool({start, end, *map(tokenizer.convert_ids_to_tokens, implicit)} & special),
    )


def check_parser(name: str, fusion: FusionConfig, info: FusedModelInfo) -> None:
    """Whether thoughts of a materialized fusion can be told apart by a parser; before its weights are loaded.

    Raises:
        ThinkingError: as `markers_of`.
    """
    leader = fusion.specialists[0]
    tokenizer = get_tokenizer(leader.model, revision=leader.revision, tokenizer_mode="hf")
    markers_of(name, tokenizer, info.num_shared_ids)


class Openings:
    """How one specialist's template leaves the thought."""

    def __init__(self, markers: Markers, render: Callable[[Sequence[Any], dict[str, Any]], str]) -> None:
        """`render` gives the text of messages under these `chat_template_kwargs`; blocks."""
        self._markers = markers
        self._render = render
        self._prompts: dict[bytes, str] = {}

    def of(self, messages: Sequence[Any], kwargs: Mapping[str, Any], text: str) -> Opening:
        """What the prompt `text` of these messages leaves."""
        if kwargs.get("continue_final_message"):
            # The response goes on: it has a thought only if one is open.
            opening = self._markers.opening_after(str(messages[-1].get("content") or ""))
            return "open" if opening == "open" else "closed"
        if not kwargs.get("add_generation_prompt", True):
            return "unopened"
        generation_prompt = self.generation_prompt(kwargs)
        if not text.endswith(generation_prompt):
            generation_prompt = self._what_is_added(messages, kwargs)
        return self._markers.opening_after(generation_prompt)

    def generation_prompt(self, kwargs: Mapping[str, Any]) -> str:
        """What the template writes where the response begins."""
        setting = {name: value for name, value in kwargs.items() if name != "tools"}
        key = hashlib.sha256(json.dumps(setting, sort_keys=True, default=str).encode()).digest()
        found = self._prompts.get(key)  # by several threads: another may empty it at any time
        if found is None:
            if len(self._prompts) >= _MAX_SETTINGS:
                self._prompts.clear()
            found = self._prompts[key] = self._what_is_added(_PROBE, setting)
        return found

    def _what_is_added(self, messages: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        with_prompt = self._render(messages, {**kwargs, "add_generation_prompt": True})
        without = self._render(messages, {**kwargs, "add_generation_prompt": False})
        num_common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(with_prompt, without, strict=False)))
        return with_prompt[num_common:]


def agreed(openings: Mapping[str, Opening]) -> Opening | None:
    """What all specialists' prompts leave, by name; None if one has a thought open and another has not.

    Where one prompt ends the thought and another says nothing, it is ended.
    """
    found = set(openings.values())
    if "open" in found:
        return "open" if len(found) == 1 else None
    return "closed" if "closed" in found else "unopened"


def check_settings(openings: Mapping[str, Openings]) -> None:
    """Whether specialists agree for every setting.

    Raises:
        ThinkingError: naming the setting and two specialists that do not.
    """
    for setting in SETTINGS:
        try:
            found = {name: own.of(_PROBE, setting, own.generation_prompt(setting)) for name, own in openings.items()}
        except (ValueError, TemplateError):  # a template that refuses a setting refuses the request that asks for it
            continue
        if agreed(found) is None:
            raise ThinkingError(f"reasoning_parser: {_told(found)} with {setting or 'no setting'}; {_WAY_OUT}")


def disagreement(openings: Mapping[str, Opening]) -> InvalidRequest:
    """The error for a request on which specialists do not agree."""
    return InvalidRequest(f"chat_template_kwargs: {_told(openings)}; change them.", "chat_template_kwargs")


_WAY_OUT = "give them chat templates that agree, or leave reasoning_parser out"


def _told(openings: Mapping[str, Opening]) -> str:
    is_open = next(name for name, own in openings.items() if own == "open")
    other = next(name for name, own in openings.items() if own != "open")
    return f"the prompt of specialist {is_open} opens a thought, that of {other} does not"
