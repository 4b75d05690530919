"""The judge of the serving tests: the Transformers reference, asked request by request."""

from typing import Any

import torch

from tests.server.engine.harness import Prompts
from ultrafuser.gating.model.reference import Generation, UltraFuserForCausalLM

MIN_GAP = 1e-3
"""Smallest top-2 distance of the reference's logits at which two float32 programs must agree on the argmax."""
MIN_ROUTER_GAP = 1e-4
"""Smallest distance of a router's logits between the last expert that is asked and the first that is not, likewise."""


class Judge:
    """Remembers what it has generated: many tests ask for the same request."""

    def __init__(self, model: UltraFuserForCausalLM) -> None:
        self.model = model
        self._seen: dict[str, Generation] = {}

    def generation(self, prompts: Prompts, max_tokens: int, **kwargs: Any) -> Generation:
        """What the fused model generates for one request; every step must have a clear winner, every router too."""
        key = repr((prompts, max_tokens, sorted(kwargs.items())))
        if key not in self._seen:
            (self._seen[key],) = self.model.respond([prompts], max_new_tokens=max_tokens, **kwargs)
            self._check_routers(prompts, self._seen[key].token_ids)
        generation = self._seen[key]
        assert float(min(generation.top2_gap)) > MIN_GAP, "choose another seed: the reference itself is undecided"
        return generation

    def tokens(self, prompts: Prompts, max_tokens: int, **kwargs: Any) -> list[int]:
        """The token ids alone."""
        return list(self.generation(prompts, max_tokens, **kwargs).token_ids)

    def _check_routers(self, prompts: Prompts, token_ids: list[int]) -> None:
        for specialist, prompt in zip(self.model.specialists, prompts, strict=True):
            if hasattr(specialist.config, "num_experts_per_tok"):
                gap = router_gap(specialist, prompt + token_ids)
                assert gap > MIN_ROUTER_GAP, f"choose another seed: a router is undecided by {gap}"


def router_gap(model: Any, token_ids: list[int]) -> float:
    """How near any layer of a model with experts comes to asking another expert, at any of the tokens."""
    with torch.no_grad():
        output = model(torch.tensor([token_ids]), output_router_logits=True)
    num_asked = model.config.num_experts_per_tok
    best_LTE = torch.stack(output.router_logits).topk(num_asked + 1).values
    return float((best_LTE[..., -2] - best_LTE[..., -1]).min())
