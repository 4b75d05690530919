"""From n forward passes to one row of logits for each row that ends in a token: match rows, gate, mix.

This is the one small interface between the specialists' forward passes and the leader's sampler; where each
specialist has ranks of its own, `server/engine/worker/split_mixing.py` stands in its place. It knows tensors and what
their rows are, not the schedule.

Shapes: S specialists, B rows that end in a token, R rows of a runner's logits, D hidden size, V vocabulary,
X marks of a row (`server/engine/worker/observing.py`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from vllm.distributed import get_tp_group

from ultrafuser.gating.model.mixture import PAPERS_MIXTURE, fuse
from ultrafuser.server.engine.shared.row import Row
from ultrafuser.server.engine.worker.gate_parts import GateParts
from ultrafuser.server.engine.worker.observing import neutralize, observe
from ultrafuser.server.engine.worker.timing import StepClock
from ultrafuser.server.engine.worker.transfer import to_device


@dataclass(frozen=True)
class Rows:
    """One runner's rows of a step, and what the forward pass left for them."""

    rows: Sequence[Row]
    """What each of the R rows is, those of unfinished prefills too."""
    hidden_RD: Tensor
    """Last hidden states (after the final norm)."""
    logits_RV: Tensor

    def indices_of(self, wanted: Sequence[Row]) -> list[int]:
        """Where this runner has another runner's rows: the same positions of the same requests."""
        if wanted == self.rows:
            return list(range(len(wanted)))
        index_of = {(row.request, row.position): index for index, row in enumerate(self.rows)}
        return [index_of[row.request, row.position] for row in wanted]


class Mixed(NamedTuple):
    """What became of a step's rows."""

    logits_RV: Tensor
    """The leader's in float32, with the fused logits in the rows that end in a token."""
    marks_XB: Tensor
    hidden_SBD: Sequence[Tensor]
    """The specialists' last hidden states in the rows that end in a token; the leader's alone if no others came."""


class Mixer:
    """The gate and what it weighs: fused logits = sum_s softmax_s(g(h_s)) * o_s, in float32 (paper, The model), or
    what another kind of gate makes of them."""

    @torch.no_grad()
    def __init__(self, parts: GateParts | None, num_shared_ids: int) -> None:
        """`parts` are those of all specialists here; None for a single one, whose weight is 1."""
        self._parts = parts
        self._num_shared_ids = num_shared_ids
        self._mixture = PAPERS_MIXTURE if parts is None else parts.gate.mixture

    @property
    def num_bytes(self) -> int:
        """Of memory beside the gate."""
        return 0 if self._parts is None else self._parts.num_bytes

    def forget(self, requests: Iterable[str]) -> None:
        """Drop what the gate remembers of requests that have ended."""
        if self._parts is not None:
            self._parts.forget(requests)

    def fuse_into_leader(self, specialists: Sequence[Rows], ending: Sequence[Row], clock: StepClock) -> Mixed:
        """The leader's logits with the fused logits in the rows that end in a token; marks.

        `specialists[0]` is the leader; `ending` are its B rows that end in a token. Ids outside the shared vocabulary
        are -inf: V stays the leader's width, which penalties, masks and top-k depend on. Rows of unfinished prefills
        keep the leader's own logits; they are garbage and nobody reads them. A row that is not finite gets equal
        logits; its marks say so.
        """
        indices_SB = [own.indices_of(ending) for own in specialists]
        pairs = list(zip(specialists, indices_SB, strict=True))
        hidden_SBD = [take(own.hidden_RD, indices_B) for own, indices_B in pairs]
        with clock.measure("gate"):
            weights_SB = self._weights(hidden_SBD, ending)
        with clock.measure("mix"):
            logits_SBV = [take(own.logits_RV, indices_B)[:, : self._num_shared_ids] for own, indices_B in pairs]
            fused = self._fuse(weights_SB, hidden_SBD, logits_SBV, specialists[0].logits_RV, indices_SB[0])
            return Mixed(*fused, hidden_SBD)

    def _fuse(
        self,
        weights_SB: Tensor,
        hidden_SBD: Sequence[Tensor],
        logits_SBV: Sequence[Tensor],
        leader_RV: Tensor,
        indices_B: list[int],
    ) -> tuple[Tensor, Tensor]:
        """Logits [R, V] and marks, with the rows at hand; `indices_B` are their places among the leader's."""
        mixed_BV, marks_XB = self._mix_and_mark(weights_SB, hidden_SBD, logits_SBV, leader_RV)
        return _into_leader(mixed_BV, leader_RV, indices_B), marks_XB

    def _mix_and_mark(
        self, weights_SB: Tensor, hidden_SBD: Sequence[Tensor], logits_SBV: Sequence[Tensor], leader_RV: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Fused logits of the leader's width and marks [X, B]."""
        if leader_RV.device.type == "cuda":
            from ultrafuser.server.engine.worker.mix_kernel import mix_and_mark

            sizes = (self._num_shared_ids, leader_RV.shape[1])
            return mix_and_mark(weights_SB, hidden_SBD, logits_SBV, *sizes, self._mixture)
        mixed_BV = fuse(weights_SB, logits_SBV, self._num_shared_ids, self._mixture)
        marks_XB, is_nonfinite_B = observe(weights_SB, hidden_SBD, logits_SBV, mixed_BV)
        neutralize(mixed_BV, is_nonfinite_B)
        return self._widen(mixed_BV, leader_RV), marks_XB

    def _widen(self, mixed_BV: Tensor, leader_RV: Tensor) -> Tensor:
        return nn.functional.pad(mixed_BV, (0, leader_RV.shape[1] - self._num_shared_ids), value=float("-inf"))

    def mix(self, hidden_SBD: Sequence[Tensor], logits_SBV: Sequence[Tensor]) -> Tensor:
        """Fused logits [B, V] of rows that all specialists have in the same order; V and -inf as above.

        Each position is taken for the first of a response: a smoothed gate looks back at none.
        """
        mixed_BV = fuse(self._weights(hidden_SBD), logits_SBV, self._num_shared_ids, self._mixture)
        return self._widen(mixed_BV, logits_SBV[0])

    def _weights(self, hidden_SBD: Sequence[Tensor], ending: Sequence[Row] | None = None) -> Tensor:
        """Weights [S, B], the same on every tensor-parallel rank: a drift of one ulp could sample two tokens."""
        if self._parts is None:
            return torch.ones(1, hidden_SBD[0].shape[0], device=hidden_SBD[0].device)
        return self._agree(self._parts.gate.weights_of(self._parts.of(hidden_SBD, ending)))

    def _agree(self, weights_SB: Tensor) -> Tensor:
        group = get_tp_group()
        if group.world_size > 1:
            weights_SB = group.broadcast(weights_SB.contiguous(), src=0)
        return weights_SB


def _into_leader(mixed_BV: Tensor, leader_RV: Tensor, indices_B: list[int]) -> Tensor:
    """The leader's rows in float32, of which `indices_B` are mixed; the others are garbage."""
    if _is_everything(indices_B, len(leader_RV)):
        return mixed_BV
    fused_RV = leader_RV.to(torch.float32, copy=True)
    return fused_RV.index_copy_(0, to_device(indices_B, leader_RV.device), mixed_BV)


def take(tensor_RX: Tensor, indices: list[int]) -> Tensor:
    """The rows `indices`; without a copy when they are all rows in order, the common case of a decode step."""
    if _is_everything(indices, tensor_RX.shape[0]):
        return tensor_RX
    return tensor_RX[to_device(indices, tensor_RX.device)]


def _is_everything(indices: list[int], num_rows: int) -> bool:
    return len(indices) == num_rows and indices == list(range(num_rows))
