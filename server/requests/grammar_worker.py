"""The process that tries constraints out for `grammars.py`: a line of JSON in, a line with the verdict out.

`ok`: compiled and applied to some tokens in time. `unknown`: xgrammar does not take it, so that vLLM decides. `slow`: a
single token took too long. `large`: it needs more memory than it may. What takes for ever gets no verdict: whoever
waits ends the process. Imports no vLLM.
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

MAX_STEP_SECONDS = 0.25
"""Longest time for one token's mask and its acceptance: every request of the batch waits for them."""

NUM_TOKENS = 48
"""How many tokens a constraint is followed; ambiguity shows within a few dozen."""

MAX_MEMORY_BYTES = 4 * 2**30
"""Most memory of this process."""

_END_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux' prctl.h


class Trial:
    """Compiles constraints for one vocabulary."""

    def __init__(self, tokenizer: str, revision: str | None, vocab_size: int, any_whitespace: bool) -> None:
        """As `server/requests/grammars.py:Vocabulary` says."""
        loaded = AutoTokenizer.from_pretrained(tokenizer, revision=revision)
        info = xgrammar.TokenizerInfo.from_huggingface(loaded, vocab_size=vocab_size)
        self._vocab_size, self._any_whitespace = vocab_size, any_whitespace
        self._stop_token_ids = info.stop_token_ids
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=2, cache_enabled=False)

    def verdict(self, kind: str, text: str) -> str:
        """`ok`, `unknown`, `slow` or `large`."""
        try:
            compiled = self._compile(kind, text)
        except MemoryError:
            return "large"
        except Exception as error:
            return "large" if "bad_alloc" in str(error) else "unknown"
        return "ok" if self._is_quick(xgrammar.GrammarMatcher(compiled)) else "slow"

    def _compile(self, kind: str, text: str) -> Any:
        """As vLLM's backend does."""
        if kind == "JSON":
            separators = None if self._any_whitespace else (",", ":")
            return self._compiler.compile_json_schema(text, any_whitespace=self._any_whitespace, separators=separators)
        if kind == "REGEX":
            return self._compiler.compile_regex(text)
        if kind == "LARK":
            return self._compiler.compile_lark(text)
        if kind == "STRUCTURAL_TAG":
            return self._compile_tag(json.loads(text))
        return self._compiler.compile_grammar(text)

    def _compile_tag(self, tag: Any) -> Any:
        """The older form has `structures`."""
        if "structures" not in tag:
            return self._compiler.compile_structural_tag(json.dumps(tag))
        items = [
            xgrammar.StructuralTagItem(begin=item["begin"], schema=json.dumps(item["schema"]), end=item["end"])
            for item in tag["structures"]
        ]
        return self._compiler.compile_structural_tag(items, tag["triggers"])

    def _is_quick(self, matcher: Any) -> bool:
        """Follow the constraint along random tokens, always the same ones, for as long as it does not have to end."""
        choose = random.Random(0).choice
        bitmask = xgrammar.allocate_token_bitmask(1, self._vocab_size)
        for _ in range(NUM_TOKENS):
            start = time.monotonic()
            matcher.fill_next_token_bitmask(bitmask, 0)
            allowed = np.flatnonzero(np.unpackbits(bitmask.numpy().view(np.uint8), bitorder="little"))
            onward = allowed[~np.isin(allowed, self._stop_token_ids)]
            if not len(onward) or not matcher.accept_token(int(choose(onward))):
                break
            if time.monotonic() - start > MAX_STEP_SECONDS:
                return False
        return True


def main(arguments: Mapping[str, Any]) -> None:
    """Answer until there are no more lines."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_END_WITH_PARENT, signal.SIGKILL)
    os.setpgrp()  # a terminal's Ctrl-C is the server's
    trial = Trial(**arguments)
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    print("ready", flush=True)
    for line in sys.stdin:
        print(trial.verdict(**json.loads(line)), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
