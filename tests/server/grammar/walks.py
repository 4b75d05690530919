"""Constraints over an alphabet of single bytes: what texts they let through, and texts drawn from them at random."""

import json
import random
from typing import Any

import numpy as np
import xgrammar

from ultrafuser.server.grammar.compiling import BOUNDED_WHITESPACE, compiled

END = 256
"""The token that ends a text."""

COMPILER = xgrammar.GrammarCompiler(
    xgrammar.TokenizerInfo(
        [bytes([byte]) for byte in range(END)] + [b"</s>"], vocab_type=xgrammar.VocabType.RAW, stop_token_ids=[END]
    ),
    max_threads=1,
    cache_enabled=False,
)
_CLOSING = frozenset(b'"}],:')


def compiled_schema(schema: Any, max_whitespace: int | None = BOUNDED_WHITESPACE) -> Any:
    """A schema as the engine compiles it."""
    return compiled(COMPILER, "JSON", json.dumps(schema), max_whitespace)


def lets_through(grammar: Any, text: str | bytes) -> bool:
    """Whether a whole text follows a compiled grammar."""
    matcher = xgrammar.GrammarMatcher(grammar)
    data = text.encode() if isinstance(text, str) else text
    return all(matcher.accept_token(byte) for byte in data) and matcher.accept_token(END)


def drawn(grammar: Any, seed: int, num_bytes: int = 160) -> str | None:
    """A random text that the grammar lets end; None if it does not end in time. What closes something is preferred."""
    draw = random.Random(seed)
    matcher, mask = xgrammar.GrammarMatcher(grammar), xgrammar.allocate_token_bitmask(1, END + 1)
    written = b""
    for number in range(num_bytes):
        matcher.fill_next_token_bitmask(mask, 0)
        bits = np.unpackbits(mask.numpy().view(np.uint8), bitorder="little")[: END + 1]
        allowed = [int(token) for token in np.flatnonzero(bits)]
        assert allowed, f"no token is allowed after {written!r}"
        if END in allowed and (len(allowed) == 1 or draw.random() < 0.5):
            return written.decode(errors="replace")
        onward = [token for token in allowed if token != END]
        closing = [token for token in onward if token in _CLOSING]
        printable = [token for token in onward if 32 <= token < 127] if draw.random() < 0.8 else []
        likely = closing if draw.random() < 0.25 + number / num_bytes else printable
        token = draw.choice(likely or onward)
        assert matcher.accept_token(token)
        written += bytes([token])
    return None
