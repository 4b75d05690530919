"""Who guesses the next tokens: the specialist that leads, or what followed the same words before.

A guess may be anything: it costs time, never exactness. Knows runners and requests; neither who verifies nor how many
guesses pay.
"""

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from ultrafuser.server.engine.worker.experience import DraftCost
from ultrafuser.server.engine.worker.guessing import Draw, Guesses, foreseen
from ultrafuser.server.engine.worker.lookahead import NGRAM, Ahead
from ultrafuser.server.engine.worker.running_ahead import run_ahead

LONGEST_NGRAM = 5
SHORTEST_NGRAM = 2
"""How many last tokens are looked for in the text before."""


class NoDrafts:
    """What vLLM takes for each runner's drafter: the fused step drafts, once all specialists know the tokens."""

    def __init__(self, vllm_config: Any) -> None:
        """vLLM makes it."""

    def propose(self, sampled_token_ids: list[list[int]], *_: object, **__: object) -> list[list[int]]:
        """No draft for any request."""
        return [[] for _ in sampled_token_ids]

    def load_model(self, *_: object) -> None:
        """There is none."""


class Drafter(Protocol):
    """Guesses what follows."""

    def propose(self, plan: Mapping[str, Ahead]) -> dict[str, list[int]]:
        """At most so many tokens as planned, by request; only ids that all specialists share.

        Asked after every step, also where nothing is planned.
        """


class Drafts(NamedTuple):
    """What came of an errand."""

    token_ids_BK: list[list[int]]
    """So many for each of its requests."""

    pass_seconds: float
    """What one pass took."""


@dataclass(frozen=True)
class Errand:
    """What one specialist is to guess: plain data, which may travel to where the specialist is."""

    requests: list[str]
    num_tokens: int
    """For each of them."""
    draws: list[Draw | None]

    @classmethod
    def of(cls, leader: GPUModelRunner, plan: Mapping[str, Ahead], requests: list[str]) -> "Errand":
        """As far as the one of these requests that goes furthest; `leader` draws the tokens."""
        longest = max(plan[request].num_tokens for request in requests)
        return cls(requests, longest, foreseen(leader, requests, longest))

    def run(self, runner: GPUModelRunner, num_shared_ids: int) -> Drafts:
        """Do it: the specialist goes on alone, one pass a draft for all requests at once."""
        start = time.perf_counter()
        tokens_BK = run_ahead(runner, self.requests, self.num_tokens, num_shared_ids, Guesses(self.draws))
        return Drafts(tokens_BK, (time.perf_counter() - start) / self.num_tokens)

    def found(self, drafts: Drafts, plan: Mapping[str, Ahead]) -> dict[str, list[int]]:
        """As many of the drafts as are planned, by request."""
        pairs = zip(self.requests, drafts.token_ids_BK, strict=True)
        return {own: tokens[: plan[own].num_tokens] for own, tokens in pairs}


def errands_of(leader: GPUModelRunner, plan: Mapping[str, Ahead]) -> dict[int, Errand]:
    """What is to be guessed by whom, by specialist."""
    drafted: dict[int, list[str]] = defaultdict(list)
    for request, ahead in plan.items():
        if ahead.num_tokens:
            drafted[ahead.drafter].append(request)
    return {drafter: Errand.of(leader, plan, requests) for drafter, requests in sorted(drafted.items())}


class LeadingDrafter:
    """Specialists go on alone, one after the other: those that lead the requests, or one in their place."""

    def __init__(self, runners: Sequence[GPUModelRunner], num_shared_ids: int, cost: DraftCost) -> None:
        """`runners[0]` draws the tokens; `cost` is told what a pass took."""
        self._runners, self._num_shared_ids, self._cost = runners, num_shared_ids, cost

    def propose(self, plan: Mapping[str, Ahead]) -> dict[str, list[int]]:
        """So many tokens as planned for every request."""
        found: dict[str, list[int]] = {}
        for drafter, errand in errands_of(self._runners[0], plan).items():
            drafts = errand.run(self._runners[drafter], self._num_shared_ids)
            self._cost.add(drafter, len(errand.requests), drafts.pass_seconds)
            found |= errand.found(drafts, plan)
        return found


class NgramDrafter:
    """What followed the last tokens where they were seen last, in the leader's prompt and the response."""

    def __init__(self, leader: GPUModelRunner, num_shared_ids: int) -> None:
        self._leader, self._num_shared_ids = leader, num_shared_ids

    def propose(self, plan: Mapping[str, Ahead]) -> dict[str, list[int]]:
        """What was found; nothing where nothing was seen."""
        return {request: self.look_up(request, ahead.num_tokens)[1] for request, ahead in plan.items()}

    def look_up(self, request: str, num_tokens: int) -> tuple[int, list[int]]:
        """How many last tokens were seen before, and at most so many that followed them."""
        batch = self._leader.input_batch
        slot = batch.req_id_to_index[request]
        num_matched, followers = _what_followed(batch.token_ids_cpu[slot, : batch.num_tokens_no_spec[slot]])
        drafts = [int(token_id) for token_id in followers[:num_tokens]]
        foreign = [index for index, token_id in enumerate(drafts) if token_id >= self._num_shared_ids]
        return num_matched, drafts[: foreign[0]] if foreign else drafts


class EitherDrafter:
    """One that goes on, or what was seen before, as the plan says for each request."""

    def __init__(self, going_on: Drafter, ngram: NgramDrafter) -> None:
        self._going_on, self._ngram = going_on, ngram

    def propose(self, plan: Mapping[str, Ahead]) -> dict[str, list[int]]:
        """Guesses of the two together."""
        looked_up = {request: ahead for request, ahead in plan.items() if ahead.drafter == NGRAM}
        others = {request: ahead for request, ahead in plan.items() if ahead.drafter != NGRAM}
        return self._ngram.propose(looked_up) | self._going_on.propose(others)


def _what_followed(token_ids: NDArray[np.int32]) -> tuple[int, NDArray[np.int32]]:
    """How many tokens of the text's end, at most `LONGEST_NGRAM`, stand before it, too, and what follows them there;
    the last of the places where most do."""
    places, num_matched = (token_ids[:-1] == token_ids[-1]).nonzero()[0], 1
    while len(places) and num_matched < LONGEST_NGRAM:
        longer = places[places >= num_matched]
        longer = longer[token_ids[longer - num_matched] == token_ids[-1 - num_matched]]
        if not len(longer):
            break
        places, num_matched = longer, num_matched + 1
    if not len(places) or num_matched < SHORTEST_NGRAM:
        return 0, token_ids[:0]
    return num_matched, token_ids[places[-1] + 1 :]
