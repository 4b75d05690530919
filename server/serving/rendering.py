"""Messages to n prompts: each specialist's own chat template and tokenizer, and one engine input out of all of them.

Every specialist reads the same content: what its template cannot show is folded into the first user turn, and special
tokens that it spells out are text to all (`gating/templates/`). The longest rendering is canonical; all n travel beside
it. A raw prompt is the same for all. Rendering runs in threads, off the event loop.
Knows text and token ids, neither HTTP nor the engine.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vllm.config import VllmConfig
from vllm.inputs import EngineInput, tokens_input
from vllm.renderers import ChatParams, TokenizeParams
from vllm.renderers.hf import HfRenderer
from vllm.tokenizers import get_tokenizer

from ultrafuser.gating.model.fusion import FusedModelInfo, FusionConfig, SpecialistConfig
from ultrafuser.gating.templates import Literals, Marked, TemplateError, fold_messages
from ultrafuser.server.engine.shared.extra_args import SPECIALIST_PROMPTS
from ultrafuser.server.engine.shared.thought import Opening
from ultrafuser.server.errors import ContextTooLong, InvalidRequest
from ultrafuser.server.requests.limits import check_token_ids
from ultrafuser.server.serving.thinking import Markers, Openings, agreed, check_settings, disagreement, markers_of

Messages = Sequence[Any]

OPENING = "opening"
"""Key of engine inputs: how the prompts leave the thought; None where none is told apart."""


@dataclass(frozen=True)
class Rendering:
    """A conversation as one specialist reads it."""

    conversation: list[Any]
    """The turns after folding, as they went into the template."""

    text: str

    token_ids: list[int]
    """The prompt in this specialist's own vocabulary."""

    opening: Opening | None
    """How the prompt leaves the thought; None where none is told apart."""


class SpecialistRenderer:
    """One specialist's chat template and tokenizer."""

    def __init__(
        self, config: VllmConfig, specialist: SpecialistConfig, eos_token_id: int, markers: Markers | None
    ) -> None:
        """`config` is the engine's; `eos_token_id` closes earlier responses in the prompt, the same for all; `markers`
        are those of a thought, if it is told apart."""
        tokenizer: Any = get_tokenizer(specialist.model, revision=specialist.revision, tokenizer_mode="hf")
        self.name = specialist.name
        self.template: str = tokenizer.get_chat_template(specialist.chat_template)
        self._max_chars_per_token: int = tokenizer.max_chars_per_token
        self._eos_token = tokenizer.convert_ids_to_tokens(eos_token_id)
        self._literals = Literals(tokenizer)
        self._renderer = HfRenderer(config, tokenizer)
        self.shutdown = self._renderer.shutdown
        self.openings = None if markers is None else Openings(markers, self._text)

    def render(self, messages: Messages, chat_params: ChatParams, tok_params: TokenizeParams) -> Rendering:
        """Fold, render and tokenize; blocks.

        Raises:
            InvalidRequest: the conversation cannot be put through the template.
            ContextTooLong: the text alone shows that the prompt is too long.
        """
        marked, own_params = self._fold(messages, chat_params)
        conversation, prompt = self._renderer.render_messages(marked.value, own_params)
        token_ids: list[int] = []
        for text, params in self._pieces(marked, prompt["prompt"], tok_params):
            if params is None:
                token_ids += self._literals.token_ids[text]
            else:
                token_ids += self._renderer.tokenize_prompt({"prompt": text}, params)["prompt_token_ids"]
        opening = self._opening(messages, chat_params, prompt["prompt"])
        return Rendering(marked.restore(conversation), marked.restore(prompt["prompt"]), token_ids, opening)

    async def render_async(self, messages: Messages, chat_params: ChatParams, tok_params: TokenizeParams) -> Rendering:
        """As `render`, without blocking the event loop."""
        marked, own_params = await asyncio.to_thread(self._fold, messages, chat_params)
        conversation, prompt = await self._renderer.render_messages_async(marked.value, own_params)
        token_ids: list[int] = []
        for text, params in self._pieces(marked, prompt["prompt"], tok_params):
            if params is None:
                token_ids += self._literals.token_ids[text]
            else:
                tokens = await self._renderer.tokenize_prompt_async({"prompt": text}, params)
                token_ids += tokens["prompt_token_ids"]
        opening = await asyncio.to_thread(self._opening, messages, chat_params, prompt["prompt"])
        return Rendering(marked.restore(conversation), marked.restore(prompt["prompt"]), token_ids, opening)

    def _opening(self, messages: Messages, chat_params: ChatParams, text: str) -> Opening | None:
        return None if self.openings is None else self.openings.of(messages, chat_params.chat_template_kwargs, text)

    def _text(self, messages: Messages, chat_template_kwargs: dict[str, Any]) -> str:
        kwargs = {**chat_template_kwargs, "tokenize": False}
        params = ChatParams(chat_template_content_format="auto", chat_template_kwargs=kwargs)
        marked, own_params = self._fold(messages, params)
        text: str = self._renderer.render_messages(marked.value, own_params)[1]["prompt"]
        return text

    def _fold(self, messages: Messages, chat_params: ChatParams) -> tuple[Marked, ChatParams]:
        kwargs = chat_params.chat_template_kwargs
        try:
            folded, tools = fold_messages(messages, kwargs.get("tools"), self.template)
        except TemplateError as error:
            raise InvalidRequest(str(error), "messages") from error
        marked = self._literals.mark({"messages": folded, "tools": tools})
        own_kwargs = {**kwargs, "tools": marked.value["tools"], "eos_token": self._eos_token}
        own_params = replace(chat_params, chat_template=self.template, chat_template_kwargs=own_kwargs)
        return replace(marked, value=marked.value["messages"]), own_params

    def _pieces(self, marked: Marked, text: str, tok_params: TokenizeParams) -> list[tuple[str, TokenizeParams | None]]:
        """The rendered text in pieces to be tokenized by themselves; None where a piece is a literal."""
        _check_text(text, tok_params, self._max_chars_per_token, "messages")
        pieces = marked.split(text)
        limit = tok_params.max_total_tokens
        if limit is not None and len(pieces) > 2 * limit:  # each literal has a token at least
            found = f"your messages resulted in {len(pieces)} pieces between special tokens"
            raise ContextTooLong(_too_long(limit, found), "messages")
        first = _untruncated(tok_params)
        others = replace(first, add_special_tokens=False)
        return [
            (piece, None if is_literal else others if index else first)
            for index, (piece, is_literal) in enumerate(pieces)
        ]


class FusedRenderer(HfRenderer):
    """vLLM's renderer for n specialists: `render_chat` gives each its own prompt, `render_cmpl` the same to all."""

    def __init__(
        self, config: VllmConfig, fusion: FusionConfig, info: FusedModelInfo, reasoning_parser: str | None = None
    ) -> None:
        """`config` is the engine's, `fusion` the materialized one that it serves; with vLLM's name of a reasoning
        parser each prompt says how it leaves the thought.

        Raises:
            ValueError: a specialist has no chat template, neither in the fusion file nor with its tokenizer.
            ThinkingError: thoughts of these specialists cannot be told apart.
        """
        leader = fusion.specialists[0]
        super().__init__(config, get_tokenizer(leader.model, revision=leader.revision, tokenizer_mode="hf"))
        self.markers = (
            markers_of(reasoning_parser, self.tokenizer, info.num_shared_ids) if reasoning_parser is not None else None
        )
        self.specialists = tuple(
            SpecialistRenderer(config, specialist, fusion.eos_token_ids[0], self.markers)
            for specialist in fusion.specialists
        )
        check_settings({own.name: own.openings for own in self.specialists if own.openings is not None})
        self._num_shared_ids = info.num_shared_ids

    def shutdown(self) -> None:
        for specialist in self.specialists:
            specialist.shutdown()
        super().shutdown()

    def render_chat(
        self,
        conversations: Sequence[Messages],
        chat_params: ChatParams,
        tok_params: TokenizeParams | None = None,
        *,
        prompt_extras: Mapping[str, Any] | None = None,
        skip_mm_cache: bool = False,
    ) -> tuple[list[Any], list[EngineInput]]:
        """One engine input per conversation, which carries all n prompts; blocks. Errors as `SpecialistRenderer`'s."""
        arrival_time = time.time()
        params = tok_params or self.default_chat_tok_params
        renderings = [
            [specialist.render(messages, chat_params, params) for specialist in self.specialists]
            for messages in conversations
        ]
        return self._fuse(renderings, params, arrival_time, prompt_extras)

    async def render_chat_async(
        self,
        conversations: Sequence[Messages],
        chat_params: ChatParams,
        tok_params: TokenizeParams | None = None,
        *,
        prompt_extras: Mapping[str, Any] | None = None,
        skip_mm_cache: bool = False,
    ) -> tuple[list[Any], list[EngineInput]]:
        """As `render_chat`, without blocking the event loop; the n specialists side by side."""
        arrival_time = time.time()
        params = tok_params or self.default_chat_tok_params
        renderings = [
            await asyncio.gather(*(item.render_async(messages, chat_params, params) for item in self.specialists))
            for messages in conversations
        ]
        return self._fuse(renderings, params, arrival_time, prompt_extras)

    async def render_cmpl_async(
        self,
        prompts: Sequence[Any],
        tok_params: TokenizeParams | None = None,
        **options: Any,
    ) -> list[EngineInput]:
        """One engine input per raw prompt (text or token ids), tokenized once, the same for every specialist.

        Raises:
            InvalidRequest: a token id that not all specialists share.
            ContextTooLong: a prompt that leaves no room for a response.
        """
        params = tok_params or self.default_cmpl_tok_params
        for prompt in prompts:
            if "prompt_token_ids" not in prompt:
                _check_text(prompt["prompt"], params, self.tokenizer.max_chars_per_token, "prompt")
        inputs: list[Any] = await super().render_cmpl_async(prompts, _untruncated(params), **options)
        limit = params.max_total_tokens
        for number, engine_input in enumerate(inputs, 1):
            token_ids = engine_input["prompt_token_ids"]
            if limit is not None and len(token_ids) >= limit:
                which = f", number {number} of {len(inputs)} prompts" if len(inputs) > 1 else ""
                found = f"your prompt resulted in {len(token_ids)} tokens{which}"
                raise ContextTooLong(_too_long(limit, found), "prompt")
            check_token_ids("prompt", token_ids, self._num_shared_ids)
        return inputs

    def _fuse(
        self,
        renderings: Sequence[Sequence[Rendering]],
        tok_params: TokenizeParams,
        arrival_time: float,
        prompt_extras: Mapping[str, Any] | None,
    ) -> tuple[list[Any], list[EngineInput]]:
        """Conversations as the leader reads them, and the engine inputs."""
        inputs = []
        for own in renderings:
            self._check_length(own, tok_params)
            canonical = max(own, key=lambda rendering: len(rendering.token_ids))
            engine_input: Any = tokens_input(
                canonical.token_ids, prompt=canonical.text, cache_salt=(prompt_extras or {}).get("cache_salt")
            )
            engine_input["arrival_time"] = arrival_time
            engine_input[SPECIALIST_PROMPTS] = [rendering.token_ids for rendering in own]
            engine_input[OPENING] = self._opening(own)
            inputs.append(engine_input)
        return [own[0].conversation for own in renderings], inputs

    def _opening(self, own: Sequence[Rendering]) -> Opening | None:
        found = {
            specialist.name: rendering.opening
            for specialist, rendering in zip(self.specialists, own, strict=True)
            if rendering.opening is not None
        }
        if not found:
            return None
        if (opening := agreed(found)) is None:
            raise disagreement(found)
        return opening

    def _check_length(self, own: Sequence[Rendering], tok_params: TokenizeParams) -> None:
        lengths = [len(rendering.token_ids) for rendering in own]
        limit, longest = tok_params.max_total_tokens, max(lengths)
        if limit is not None and longest >= limit:
            name = self.specialists[lengths.index(longest)].name
            which = f" for specialist {name}, the longest of {len(own)} renderings" if len(own) > 1 else ""
            raise ContextTooLong(_too_long(limit, f"your messages resulted in {longest} tokens{which}"), "messages")


def _untruncated(tok_params: TokenizeParams) -> TokenizeParams:
    """vLLM cuts what is too long and then only knows "at least"; the error is to name the true length."""
    return replace(tok_params, max_total_tokens=None) if tok_params.truncate_prompt_tokens is None else tok_params


def _check_text(text: str, tok_params: TokenizeParams, max_chars_per_token: int, param: str) -> None:
    """Refuse what is too long however it is tokenized, so that a huge text costs nothing."""
    limit = tok_params.max_total_tokens
    if limit is not None and tok_params.truncate_prompt_tokens is None and len(text) > limit * max_chars_per_token:
        found = f"your {param} resulted in {len(text)} characters, more than {limit} tokens can hold"
        raise ContextTooLong(_too_long(limit, found), param)


def _too_long(limit: int, found: str) -> str:
    return (
        f"This model's maximum context length is {limit} tokens, prompt and response together. "
        f"However, {found}. Please reduce the length."
    )
