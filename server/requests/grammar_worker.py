"""The process that tries constraints out for `grammars.py`: a line of JSON in, a line of JSON with the verdict out.

The verdict is null for a constraint that was compiled and applied to some tokens in time; else it says what is wrong
with it. What takes for ever gets no verdict: whoever waits ends the process. It compiles by the engine's own code
(`server/grammar/`). Imports no vLLM.
"""

import ctypes
import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import xgrammar
from transformers import AutoTokenizer

from ultrafuser.server.grammar.compiling import compiled
from ultrafuser.server.grammar.errors import ConstraintError

MAX_STEP_SECONDS = 0.25
"""Longest time for one token's mask and its acceptance: every request of the batch waits for them."""

NUM_TOKENS = 48
"""How many tokens a constraint is followed; ambiguity shows within a few dozen."""

MAX_MEMORY_BYTES = 4 * 2**30
"""Most memory of this process."""

TOO_LARGE = "it needs too much memory; simplify it"

_END_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux' prctl.h


class Trial:
    """Compiles constraints for one vocabulary."""

    def __init__(
        self,
        tokenizer: str,
        revision: str | None,
        vocab_size: int,
        num_shared_ids: int,
        stop_token_ids: list[int],
        max_whitespace: int | None,
    ) -> None:
        """As `server/requests/grammars.py:Vocabulary` says."""
        loaded = AutoTokenizer.from_pretrained(tokenizer, revision=revision)
        info = xgrammar.TokenizerInfo.from_huggingface(loaded, vocab_size=vocab_size)
        self._vocab_size, self._num_shared_ids = vocab_size, num_shared_ids
        self._stop_token_ids, self._max_whitespace = stop_token_ids, max_whitespace
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=2, cache_enabled=False)

    def verdict(self, kind: str, text: str, **_: Any) -> str | None:
        """What is wrong with a constraint."""
        try:
            grammar = compiled(self._compiler, kind, text, self._max_whitespace)
            return self._follow(xgrammar.GrammarMatcher(grammar, override_stop_tokens=self._stop_token_ids))
        except MemoryError:
            return TOO_LARGE
        except ConstraintError as error:
            return str(error)
        except Exception as error:
            return f"it cannot be applied: {error}"

    def _follow(self, matcher: Any) -> str | None:
        """Follow the constraint along random tokens, always the same ones, for as long as it does not have to end."""
        choose = random.Random(0).choice
        bitmask = xgrammar.allocate_token_bitmask(1, self._vocab_size)
        for _ in range(NUM_TOKENS):
            start = time.monotonic()
            matcher.fill_next_token_bitmask(bitmask, 0)
            allowed = np.flatnonzero(np.unpackbits(bitmask.numpy().view(np.uint8), bitorder="little"))
            allowed = allowed[allowed < self._num_shared_ids]
            if not len(allowed):
                return "it leads to a place where no token of the vocabulary is allowed"
            onward = allowed[~np.isin(allowed, self._stop_token_ids)]
            if not len(onward) or not matcher.accept_token(int(choose(onward))):
                break
            if time.monotonic() - start > MAX_STEP_SECONDS:
                return "it is too ambiguous to be applied to every token; simplify it"
        return None


def main(arguments: Mapping[str, Any]) -> None:
    """Answer until there are no more lines."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_END_WITH_PARENT, signal.SIGKILL)
    os.setpgrp()  # a terminal's Ctrl-C is the server's
    trial = Trial(**arguments)
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(trial.verdict(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
