"""One conversation as every specialist reads it: n token sequences whose response tokens are the same, one to one.

A response is tokenised once, alone, and ended by the fusion's first EOS. A template gives only what surrounds it: what
precedes response k is the prompt that a server would render for it, with the generation prompt at its end, and what was
thought before it where the template shows that: a thought is read, not trained on. Special
tokens that a conversation spells out are text, as they are to a server.
Knows templates and tokenizers; does not know files, batches or models.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from ultrafuser.gating.errors import CommandError
from ultrafuser.gating.model.inspection import FusedModelInfo
from ultrafuser.gating.model.schema import FusionConfig
from ultrafuser.gating.templates import Literals, TemplateError, fold_messages, reasoning_of

# Stands for response k while a template is rendered: no template trims it, no conversation contains it.
_MARK = "\ue000response {}\ue001"


class EncodingError(ValueError):
    """A conversation cannot be trained on. One line: what is wrong with it."""


@dataclass(frozen=True)
class EncodedConversation:
    """Token ids of one conversation, one sequence per specialist, in the fusion's order."""

    input_ids: list[list[int]]
    """S sequences: glue and responses in turn, ending with a response."""

    response_mask: list[list[bool]]
    """S sequences: true at every response token. All have the same number of true entries, at the same tokens."""

    num_response_tokens: int
    """Tokens that the loss is taken on."""

    length: int
    """Tokens of the longest sequence."""

    is_cut: bool
    """Whether the end of the conversation is missing: turns, or the end of the last response (then without EOS)."""


class _Template:
    """One specialist's chat template and tokenizer."""

    def __init__(self, tokenizer: Any, chat_template: str | None, eos_token_id: int) -> None:
        self._tokenizer = tokenizer
        self._literals = Literals(tokenizer)
        self.text: str = tokenizer.get_chat_template(chat_template)
        self._eos_token: str = tokenizer.convert_ids_to_tokens(eos_token_id)
        self._closing = re.compile(r"\A\s*" + re.escape(self._eos_token))

    def glue_ids(self, messages: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        """Token ids before each response: `glue_ids[k]` lies between response k-1 and response k."""
        glue: list[list[int]] = []
        marked: list[Mapping[str, Any]] = []
        for message in messages:
            if message["role"] == "assistant":
                message = {**message, "content": _MARK.format(len(glue))}
                glue.append(self._before(marked, len(glue), message))
            marked.append(message)
        return glue

    def _before(
        self, messages: Sequence[Mapping[str, Any]], num_responses: int, response: Mapping[str, Any]
    ) -> list[int]:
        """What follows the last of so many responses, each a mark, up to and with the generation prompt.

        If the response was thought of first, up to and with the thought, where the template shows it.
        """
        has_thought = reasoning_of(response) is not None
        folded, _ = fold_messages([*messages, response] if has_thought else messages, None, self.text)
        literal = self._literals.mark(folded)
        text = self._tokenizer.apply_chat_template(
            literal.value,
            chat_template=self.text,
            tokenize=False,
            add_generation_prompt=not has_thought,
            eos_token=self._eos_token,
        )
        if has_thought:
            text, own_mark, _ = text.partition(str(response["content"]))
            if not own_mark:
                raise EncodingError(f"messages: the template does not show response {num_responses + 1}")
        if num_responses:
            _, mark, text = text.partition(_MARK.format(num_responses - 1))
            if not mark or _MARK.format(num_responses - 1) in text:
                raise EncodingError(f"messages: the template does not show response {num_responses} exactly once")
            # The response brings its own EOS: the template's would be a second one.
            text = self._closing.sub("", text)
        return self._literals.encode(text, literal)


class ConversationEncoder:
    """Encodes conversations for all specialists of a fusion.

    Args:
        fusion: a materialized fusion.
        tokenizers: the specialists' tokenizers, in the fusion's order.
        num_shared_ids: ids from here on cannot be predicted (`FusedModelInfo.num_shared_ids`).
        max_length: most tokens of any one specialist's sequence.
    """

    def __init__(
        self, fusion: FusionConfig, tokenizers: Sequence[Any], *, num_shared_ids: int, max_length: int
    ) -> None:
        self._names = fusion.specialist_names
        self._eos_token_id = fusion.eos_token_ids[0]
        self._responses = Literals(tokenizers[0])
        self._num_shared_ids = num_shared_ids
        self._max_length = max_length
        self._templates = [
            _Template(tokenizer, specialist.chat_template, self._eos_token_id)
            for specialist, tokenizer in zip(fusion.specialists, tokenizers, strict=True)
        ]

    @property
    def template_texts(self) -> list[str]:
        """Jinja text of every specialist's template: part of what the encoded tokens depend on."""
        return [template.text for template in self._templates]

    def encode(self, messages: Sequence[Mapping[str, Any]]) -> EncodedConversation:
        """Encode one conversation, which ends with a response.

        What does not fit into `max_length` for the specialist with the longest sequence is left out for all: turns
        from the end, then the end of the last response that has begun. A response's start is never cut.

        Raises:
            EncodingError: a template cannot show it, a response holds ids that not all specialists share, or the first
                prompt leaves no room for a single response token.
        """
        responses = [self._response_ids(message["content"]) for message in messages if message["role"] == "assistant"]
        glue = [
            self._glue(name, template, messages) for name, template in zip(self._names, self._templates, strict=True)
        ]
        lengths = [len(response) for response in responses]
        kept = [min(room) for room in zip(*(_fitting(own, lengths, self._max_length) for own in glue), strict=True)]
        if kept[0] < 1:
            longest = max(range(len(glue)), key=lambda index: len(glue[index][0]))
            raise EncodingError(
                f"messages: the prompt of {len(glue[longest][0])} tokens ({self._names[longest]}) leaves no room for"
                f" a response within {self._max_length}"
            )
        responses = [response[:count] for response, count in zip(responses, kept, strict=True) if count > 0]
        input_ids = [_join(own, responses) for own in glue]
        return EncodedConversation(
            input_ids=input_ids,
            response_mask=[_join_masks(own, responses) for own in glue],
            num_response_tokens=sum(kept),
            length=max(len(ids) for ids in input_ids),
            is_cut=kept != lengths,
        )

    def _response_ids(self, text: str) -> list[int]:
        literal = self._responses.mark(text)
        ids = [*self._responses.encode(literal.value, literal), self._eos_token_id]
        foreign = [token_id for token_id in ids if token_id >= self._num_shared_ids]
        if foreign:
            raise EncodingError(f"messages: a response holds token id {foreign[0]}, which not all specialists share")
        return ids

    def _glue(self, name: str, template: _Template, messages: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        from jinja2 import TemplateError as JinjaError

        try:
            return template.glue_ids(messages)
        except (TemplateError, EncodingError, JinjaError) as error:
            raise EncodingError(f"{error} (specialist {name})") from error


def resolve_max_length(max_length: int | None, info: FusedModelInfo) -> int:
    """Most tokens of a conversation: what was asked for, or the fusion's limit.

    Raises:
        CommandError: more than that.
    """
    if max_length is not None and max_length > info.max_model_len:
        raise CommandError(f"--max-length: {max_length} is more than the fusion's {info.max_model_len}; lower it")
    return max_length or info.max_model_len


def make_encoder(
    fusion: FusionConfig, info: FusedModelInfo, max_length: int
) -> tuple[ConversationEncoder, dict[str, object]]:
    """The encoder of a prepared fusion, and all that its result depends on beside the conversations."""
    from transformers import AutoTokenizer

    tokenizers = [AutoTokenizer.from_pretrained(item.model, revision=item.revision) for item in fusion.specialists]
    encoder = ConversationEncoder(fusion, tokenizers, num_shared_ids=info.num_shared_ids, max_length=max_length)
    return encoder, {
        "tokenizers": [_digest(tokenizer) for tokenizer in tokenizers],
        "templates": encoder.template_texts,
        "eos": fusion.eos_token_ids[0],
        "num_shared_ids": info.num_shared_ids,
        "max_length": max_length,
    }


def _fitting(glue: Sequence[Sequence[int]], lengths: Sequence[int], max_length: int) -> list[int]:
    """How many tokens of each response one specialist has room for; after a cut response nothing follows."""
    spans = zip(accumulate(len(own) for own in glue), accumulate(lengths), lengths, strict=True)
    return [max(0, min(length, max_length - before - (end - length))) for before, end, length in spans]


def _join(glue: Sequence[list[int]], responses: Sequence[list[int]]) -> list[int]:
    return [token for own, response in zip(glue, responses, strict=False) for token in (*own, *response)]


def _join_masks(glue: Sequence[list[int]], responses: Sequence[list[int]]) -> list[bool]:
    pairs = zip(glue, responses, strict=False)
    return [flag for own, response in pairs for flag in (*[False] * len(own), *[True] * len(response))]


def _digest(tokenizer: Any) -> str:
    content = [
        tokenizer.backend_tokenizer.to_str(),
        {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
