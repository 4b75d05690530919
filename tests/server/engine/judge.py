"""The judge of the serving tests: the Transformers reference, asked request by request."""

from typing import Any

from tests.server.engine.harness import Prompts
from ultrafuser.gating.model.reference import Generation, UltraFuserForCausalLM

MIN_GAP = 1e-3
"""Smallest top-2 distance of the reference's logits at which two float32 programs must agree on the argmax."""


class Judge:
    """Remembers what it has generated: many tests ask for the same request."""

    def __init__(self, model: UltraFuserForCausalLM) -> None:
        self.model = model
        self._seen: dict[str, Generation] = {}

    def generation(self, prompts: Prompts, max_tokens: int, **kwargs: Any) -> Generation:
        """What the fused model generates for one request; every step must have a clear winner."""
        key = repr((prompts, max_tokens, sorted(kwargs.items())))
        if key not in self._seen:
            (self._seen[key],) = self.model.generate([prompts], max_new_tokens=max_tokens, **kwargs)
        generation = self._seen[key]
        assert float(min(generation.top2_gap)) > MIN_GAP, "choose another seed: the reference itself is undecided"
        return generation

    def tokens(self, prompts: Prompts, max_tokens: int, **kwargs: Any) -> list[int]:
        """The token ids alone."""
        return list(self.generation(prompts, max_tokens, **kwargs).token_ids)
