"""Specialists with ranks of their own guess at the same time, each for the requests that it drafts for.

The leader's ranks know who drafts for whom and how far, since their first one has chosen it for all; they tell the
others after every step, and these obey: whoever decided for itself would wait for what nobody sends. Knows errands and
the exchange; neither who chooses nor who verifies.
"""

from collections.abc import Mapping

from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from ultrafuser.server.engine.worker.drafting import Drafts, Errand, errands_of
from ultrafuser.server.engine.worker.exchange import Exchange
from ultrafuser.server.engine.worker.experience import DraftCost
from ultrafuser.server.engine.worker.lookahead import Ahead
from ultrafuser.server.engine.worker.output_heads import computing_logits


class AskingDrafter:
    """The leader's: it has others guess, and does its own part meanwhile."""

    def __init__(self, leader: GPUModelRunner, num_shared_ids: int, exchange: Exchange, cost: DraftCost) -> None:
        """`cost` is told what a pass of each specialist took, by its own clock."""
        self._leader, self._num_shared_ids = leader, num_shared_ids
        self._exchange, self._cost = exchange, cost

    def propose(self, plan: Mapping[str, Ahead]) -> dict[str, list[int]]:
        """So many tokens as planned for every request. Others wait for a word after every step, even if it is none."""
        errands = errands_of(self._leader, plan)
        self._exchange.tell_object(errands)
        if not errands:
            return {}
        own = errands[0].run(self._leader, self._num_shared_ids) if 0 in errands else None
        drafts: list[Drafts] = self._exchange.share(own)
        found: dict[str, list[int]] = {}
        for drafter, errand in errands.items():
            self._cost.add(drafter, len(errand.requests), drafts[drafter].pass_seconds)
            found |= errand.found(drafts[drafter], plan)
        return found


class AskedDrafter:
    """A follower's: it guesses what it is told to, and keeps nothing of it."""

    def __init__(self, runner: GPUModelRunner, index: int, num_shared_ids: int, exchange: Exchange) -> None:
        """`index` is the specialist's place in the fusion file."""
        self._runner, self._index = runner, index
        self._num_shared_ids, self._exchange = num_shared_ids, exchange

    def answer(self) -> None:
        """To be called after every step, once its tokens are noted."""
        errands: dict[int, Errand] = self._exchange.tell_object()
        if not errands:
            return
        own = None
        if self._index in errands:
            with computing_logits(self._runner):
                own = errands[self._index].run(self._runner, self._num_shared_ids)
        self._exchange.share(own)
