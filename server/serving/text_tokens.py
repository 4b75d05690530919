"""The tokens of a given text: what each adds to it, and which of its bytes it stands for.

Vocabularies of bytes cut characters. As in OpenAI's log probabilities the bytes of all tokens together are the text's,
whatever the tokenizer made of it on the way; a character that is cut is the text of the token that completes it. Knows
one tokenizer, no models and no requests.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

_BYTE = re.compile("<0x[0-9A-F]{2}>")  # how vocabularies of words spell one


@dataclass(frozen=True)
class TextToken:
    token_id: int

    text: str
    """What it adds; empty if it only begins a character, or if the tokenizer has added it."""

    own_bytes: bytes


def tokens_of(tokenizer: Any, text: str, *, add_special_tokens: bool) -> list[TextToken]:
    """The text's tokens, which together have its characters and its bytes.

    Raises:
        NotImplementedError: a tokenizer written in Python does not say where its tokens are.
    """
    encoded = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
    num_bytes = list(accumulate((len(letter.encode()) for letter in text), initial=0))  # before each character
    whole = text.encode()
    tokens, begin, first_byte = [], 0, 0
    spans = encoded["offset_mapping"]
    for token_id, (_, span_end), own_end in zip(encoded["input_ids"], spans, _ends(spans, len(text)), strict=True):
        end = max(begin, own_end)
        last_byte = num_bytes[end]
        if own_end < span_end:  # the rest of its bytes are of a character that later tokens complete
            last_byte = min(first_byte + _length(tokenizer.convert_ids_to_tokens(token_id)), num_bytes[span_end])
        last_byte = max(first_byte, last_byte)
        tokens.append(TextToken(token_id, text[begin:end], whole[first_byte:last_byte]))
        begin, first_byte = end, last_byte
    return tokens


def _ends(spans: Sequence[tuple[int, int]], length: int) -> list[int]:
    """Where the characters end that each token completes; the last one that has any takes what is left."""
    ends: list[int] = []
    following: int | None = None
    for start, end in reversed(spans):
        if start == end:
            ends.append(0)
            continue
        ends.append(length if following is None else min(end, following))
        following = start
    return ends[::-1]


def _length(token: str) -> int:
    """Of a token that is no whole text, in bytes: byte-level vocabularies write each of them as one letter."""
    return 1 if _BYTE.fullmatch(token) else len(token)
