"""Special tokens that the text of a conversation spells out stay text: nobody ends a turn, or begins one, from within.

A template's own special tokens and the same characters in a message look alike once they are rendered. So those of the
messages are replaced by marks before, characters that occur nowhere else, and come back as the ordinary tokens of their
spelling. Knows text and one tokenizer, no templates.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_MARKS = range(0x100000, 0x10FFFE)
"""Private characters: no template, no normalizer and no trimming touches them."""


@dataclass(frozen=True)
class Marked:
    """A value in whose strings special tokens are replaced by marks."""

    value: Any
    """As it was given, but for the marks."""

    originals: Mapping[str, str]
    """Special tokens by their marks."""

    def restore(self, value: Any) -> Any:
        """Put the special tokens back in the place of their marks, in every string of a value."""
        return _in_strings(value, self._restore_text) if self.originals else value

    def split(self, text: str) -> list[tuple[str, bool]]:
        """Rendered text in pieces, and of each whether it is a special token that was marked."""
        if not self.originals:
            return [(text, False)]
        pieces = re.split(f"([{''.join(self.originals)}])", text)
        return [(self.originals.get(piece, piece), piece in self.originals) for piece in pieces if piece]

    def _restore_text(self, text: str) -> str:
        return "".join(piece for piece, _ in self.split(text))


class Literals:
    """The special tokens of one tokenizer, and how their spelling is tokenized."""

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer` is a Transformers tokenizer."""
        self._tokenizer = tokenizer
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        longest_first = sorted(special | set(tokenizer.all_special_tokens), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        self.token_ids: Mapping[str, list[int]] = {
            text: tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) for text in longest_first
        }
        """Ordinary tokens that spell each special one."""
        tokenizer.encode("", add_special_tokens=False)  # fast tokenizers keep the last call's way of splitting

    def mark(self, value: Any) -> Marked:
        """Replace the special tokens in every string of a value; lists and objects are not changed but made anew."""
        strings = list(_strings(value))
        found = {text for string in strings for text in (self._pattern.findall(string) if self._pattern else ())}
        if not found:
            return Marked(value, {})
        used = set().union(*strings)
        unused = (mark for code in _MARKS if (mark := chr(code)) not in used)
        marks = dict(zip(sorted(found), unused, strict=False))
        assert self._pattern is not None
        pattern = self._pattern
        value = _in_strings(value, lambda string: pattern.sub(lambda match: marks[match[0]], string))
        return Marked(value, {mark: text for text, mark in marks.items()})

    def encode(self, text: str, marked: Marked) -> list[int]:
        """Token ids of a text into which a marked value was rendered, without tokens that the tokenizer would add."""
        return [
            token_id
            for piece, is_literal in marked.split(text)
            for token_id in (
                self.token_ids[piece] if is_literal else self._tokenizer.encode(piece, add_special_tokens=False)
            )
        ]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        inner: Iterable[Any] = [*value, *value.values()] if isinstance(value, Mapping) else value
        for item in inner:
            yield from _strings(item)


def _in_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_in_strings(key, change): _in_strings(item, change) for key, item in value.items()}
    return [_in_strings(item, change) for item in value] if isinstance(value, list | tuple) else value
