"""A trained head guesses what follows, from what all specialists made of the response so far.

It keeps keys and values of its own: for every request that can run at once a ring of the latest positions of its
response, allocated before vLLM measures how much memory is left. Positions that it was not shown (computed before a
preemption, or of an earlier turn) are not in the ring and are not attended to. Knows the head, tensors and requests;
neither gate nor verification.

Shapes: S specialists, B rows or requests, R requests that can run at once, C places of a ring, D the head's size,
K heads of keys and values, E size of a head.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from ultrafuser.gating.model.draft_head import DraftHead, attend
from ultrafuser.server.engine.shared.row import Row
from ultrafuser.server.engine.worker.experience import DraftCost
from ultrafuser.server.engine.worker.guessing import Guesses, foreseen
from ultrafuser.server.engine.worker.lookahead import Ahead
from ultrafuser.server.engine.worker.transfer import to_device

NOTHING = -1
"""Position of a place that holds none."""


@dataclass(frozen=True)
class _Latest:
    """Where a response stands."""

    position: int
    """Of its last token."""

    token_id: int
    feature_D: Tensor


class HeadDrafter:
    """One head drafts for all requests at once: a pass of it a draft."""

    def __init__(self, leader: GPUModelRunner, head: DraftHead, cost: DraftCost) -> None:
        """`leader`, whose weights need not be loaded yet, lends its embeddings; `cost` is told what a pass took."""
        self._leader, self._cost = leader, cost
        self._head = head.to(leader.device, leader.model_config.dtype)
        config = head.config
        num_requests = leader.scheduler_config.max_num_seqs
        # Drafts stand ahead of the window, and must not take the place of what it still holds.
        self._num_places = config.window + leader.num_spec_tokens
        shape = (num_requests, self._num_places, config.num_kv_heads, config.head_size)
        options = {"dtype": leader.model_config.dtype, "device": leader.device}
        # Written, not only reserved: on a CPU what vLLM finds taken is what was touched.
        self._keys_RCKE, self._values_RCKE = torch.full(shape, 0.0, **options), torch.full(shape, 0.0, **options)
        self._positions_RC = torch.full(shape[:2], NOTHING, dtype=torch.int64, device=leader.device)
        self._rings: dict[str, int] = {}
        self._free = list(range(num_requests))
        self._latest: dict[str, _Latest] = {}

    @property
    def num_bytes(self) -> int:
        """Of the head's weights and all rings."""
        tensors = (*self._head.state_dict().values(), self._keys_RCKE, self._values_RCKE, self._positions_RC)
        return sum(own.nbytes for own in tensors)

    @property
    def num_free_rings(self) -> int:
        """For how many more requests there is room."""
        return len(self._free)

    @torch.inference_mode()
    def features(self, hidden_SBD: Sequence[Tensor], weights_SB: Tensor) -> Tensor:
        """Features [B, D] of a step's rows: the specialists' last hidden states, and the gate's weights."""
        return self._head.features(hidden_SBD, weights_SB)

    @torch.inference_mode()
    def read(self, rows: Sequence[Row], features_BD: Tensor) -> None:
        """Take in a step's rows that end in a token, once all tokens are known; `features` had their states.

        Rows behind a wrong draft are passed over. Of a prompt that is read in chunks there is no such row but its last.
        """
        outputs = {row.request: self._leader.requests[row.request].output_token_ids for row in rows}
        kept = [index for index, row in enumerate(rows) if row.position < len(outputs[row.request])]
        if not kept:
            return
        known = [rows[index] for index in kept]
        features_BD = features_BD[to_device(kept, features_BD.device)]
        token_ids = [int(outputs[row.request][row.position]) for row in known]
        positions_B = self._to_device([row.position for row in known])
        inputs_BX = self._head.inputs(self._embed(self._to_device(token_ids)), features_BD)
        self._write(self._to_device([self._ring_of(row.request) for row in known]), positions_B, inputs_BX)
        for row, token_id, feature_D in zip(known, token_ids, features_BD, strict=True):
            self._latest[row.request] = _Latest(row.position, token_id, feature_D)

    def propose(self, plan: Mapping[str, Ahead]) -> dict[str, list[int]]:
        """So many tokens as planned for every request; those that `read` was shown to their last token."""
        requests = [request for request, ahead in plan.items() if ahead.num_tokens]
        if not requests:
            return {}
        longest = max(plan[request].num_tokens for request in requests)
        start = time.perf_counter()
        drafts = self._run_ahead(requests, longest)
        self._cost.add(0, len(requests), (time.perf_counter() - start) / longest)
        return {own: tokens[: plan[own].num_tokens] for own, tokens in zip(requests, drafts, strict=True)}

    @torch.inference_mode()
    def rehearse(self, hidden_SBD: Sequence[Tensor]) -> None:
        """Do once what takes most memory: with so many rows, and with a pass for all requests that can run at once."""
        rings_R = torch.arange(len(self._positions_RC), device=self._leader.device)
        self.features(hidden_SBD, torch.ones(len(hidden_SBD), len(hidden_SBD[0]), device=self._leader.device))
        zeros_RD = self._keys_RCKE.new_zeros(len(rings_R), self._head.config.size)
        self._logits(self._pass(rings_R, torch.zeros_like(rings_R), zeros_RD, zeros_RD))
        self._positions_RC.fill_(NOTHING)

    @torch.inference_mode()
    def _run_ahead(self, requests: Sequence[str], num_tokens: int) -> list[list[int]]:
        """So many tokens for each request, chosen one after the other."""
        guesses = Guesses(foreseen(self._leader, requests, num_tokens))
        latest = [self._latest[request] for request in requests]
        rings_B = self._to_device([self._rings[request] for request in requests])
        ids_B = self._to_device([own.token_id for own in latest])
        positions_B = self._to_device([own.position for own in latest])
        features_BD = torch.stack([own.feature_D for own in latest])
        drafts = []
        for index in range(num_tokens):
            features_BD = self._pass(rings_B, positions_B, self._embed(ids_B), features_BD)
            ids_B = guesses.choose(self._logits(features_BD), index)
            positions_B = positions_B + 1
            drafts.append(ids_B)
        tokens_BK: list[list[int]] = torch.stack(drafts, dim=1).tolist()
        return tokens_BK

    def _pass(self, rings_B: Tensor, positions_B: Tensor, embeddings_BD: Tensor, features_BD: Tensor) -> Tensor:
        """The head's output [B, D] at one position of each request, which then is in its ring."""
        inputs_BX = self._head.inputs(embeddings_BD, features_BD)
        self._write(rings_B, positions_B, inputs_BX)
        # A draft that did not hold stands further ahead, or was written over: it is never looked at.
        back_BC = positions_B[:, None] - self._positions_RC[rings_B]
        is_seen_BC = (self._positions_RC[rings_B] != NOTHING) & (back_BC >= 0) & (back_BC < self._head.config.window)
        queries_BKGE = self._head.queries(inputs_BX, positions_B)
        attended_BX = attend(queries_BKGE, self._keys_RCKE[rings_B], self._values_RCKE[rings_B], is_seen_BC)
        return self._head.states(features_BD, attended_BX)

    def _logits(self, features_BD: Tensor) -> Tensor:
        """Scores [B, V] of the leader's vocabulary; minus infinity for what the head does not guess."""
        scores_BV = self._head.scores(features_BD)
        everywhere_BV = scores_BV.new_full((len(scores_BV), self._leader.model_config.get_vocab_size()), -torch.inf)
        everywhere_BV[:, self._head.draft_ids_V] = scores_BV
        return everywhere_BV

    def _write(self, rings_B: Tensor, positions_B: Tensor, inputs_BX: Tensor) -> None:
        keys_BKE, values_BKE = self._head.keys_values(inputs_BX, positions_B)
        places_B = positions_B % self._num_places
        self._keys_RCKE[rings_B, places_B] = keys_BKE
        self._values_RCKE[rings_B, places_B] = values_BKE
        self._positions_RC[rings_B, places_B] = positions_B

    def _embed(self, ids_B: Tensor) -> Tensor:
        """The leader's embeddings [B, D], whole on every rank."""
        embeddings_BD: Tensor = self._leader.model.embed_input_ids(ids_B)
        return embeddings_BD

    def _ring_of(self, request: str) -> int:
        if request not in self._rings:
            self._rings[request] = self._free.pop()
        return self._rings[request]

    def forget_all_but(self, requests: Mapping[str, int]) -> None:
        """Free the rings of requests that are not in the batch any more: ended, aborted or preempted."""
        for request in self._rings.keys() - requests.keys():
            ring = self._rings.pop(request)
            self._positions_RC[ring] = NOTHING
            # What is not looked at counts zero times its value, which is no number if the value is none.
            self._values_RCKE[ring] = 0
            self._free.append(ring)
            del self._latest[request]

    def _to_device(self, numbers: Sequence[int]) -> Tensor:
        return to_device(numbers, self._leader.device)
