"""Gate and mixture where each specialist has ranks of its own: followers send what the leader mixes.

For every row that ends in a token a follower sends two numbers, the gate's score and the sum of the hidden state, and
its logits in their own type, or else its hidden state (`server/engine/worker/output_heads.py`); where a trained head
drafts, which looks at the states, it sends both. The arithmetic, and its order, is that of
`server/engine/worker/mixing.py`. With the numbers go the times that the follower has measured. Knows tensors and what
their rows are, not the schedule.

Shapes: S specialists, B rows that end in a token, D hidden size, V vocabulary, F spans of a follower.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ultrafuser.gating.model.gate import Gate
from ultrafuser.gating.model.mixture import fuse
from ultrafuser.server.engine.shared.row import Row
from ultrafuser.server.engine.shared.step import Span
from ultrafuser.server.engine.worker.exchange import Exchange
from ultrafuser.server.engine.worker.mixing import Mixed, Mixer, Rows, take
from ultrafuser.server.engine.worker.output_heads import Sent
from ultrafuser.server.engine.worker.timing import StepClock
from ultrafuser.server.engine.worker.transfer import to_device

_NUM_SPANS = 4
"""Times that a follower tells of at once: two a step come up, more after steps in which no row ended in a token."""

Kinds = tuple[Literal["logits", "hidden"], ...]
"""What is sent of a row: what is mixed, and behind logits the hidden state if a trained head looks at it."""

_PARTS = ("prefill", "decode", "idle")


class GatheringMixer(Mixer):
    """The leader's: its own rows and what the followers send become one mixture."""

    def __init__(
        self,
        gate: Gate,
        num_shared_ids: int,
        names: Sequence[str],
        kinds: Kinds,
        exchange: Exchange,
        sent: Sequence[Sent],
    ) -> None:
        """Of each row every follower sends `kinds`, in the form of `sent`; `names` are those of all specialists."""
        super().__init__(gate, num_shared_ids)
        self._score_of = gate.score_of
        self._names, self._kinds, self._exchange, self._sent = names, kinds, exchange, sent
        self.num_bytes = sum(own.num_bytes for own in sent)

    def fuse_into_leader(self, specialists: Sequence[Rows], ending: Sequence[Row], clock: StepClock) -> Mixed:
        """As for shared ranks, of the leader's rows and the followers'; `ending` in the order that all ranks know."""
        (own,) = specialists
        indices_B = own.indices_of(ending)
        hidden_BD = take(own.hidden_RD, indices_B)
        with clock.measure("gate"):
            own_2B = _numbers(self._score_of(0, hidden_BD), hidden_BD)
        with clock.measure("idle", self._names[0]):
            told_S2N = self._exchange.receive([((2, len(ending) + _NUM_SPANS), torch.float32)] * len(self._sent))
        with clock.measure("exchange"):
            sent_SBX = self._receive_rows(len(ending))
            hidden_SBD = self._hidden(sent_SBX)
        with clock.measure("mix"):
            for name, told_2N in zip(self._names[1:], told_S2N, strict=True):
                clock.hear(told_2N[:, len(ending) :], partial(_spans, name))
            numbers_S2B = torch.stack([own_2B, *(told_2N[:, : len(ending)] for told_2N in told_S2N)])
            logits_SBV = [take(own.logits_RV, indices_B)[:, : self._num_shared_ids], *self._logits(sent_SBX)]
            # A sum is finite if the state is, and stands for it where that is looked at.
            sums_SB1 = [own_B[:, None].clone() for own_B in numbers_S2B[:, 1]]  # aligned for a device
            fused = self._fuse(self._weights_of(numbers_S2B), sums_SB1, logits_SBV, own.logits_RV, indices_B)
            return Mixed(*fused, [hidden_BD, *hidden_SBD])

    def mix(self, hidden_SBD: Sequence[Tensor], logits_SBV: Sequence[Tensor]) -> Tensor:
        """As for shared ranks, of the leader's rows and the followers'."""
        (hidden_BD,), (logits_BV,) = hidden_SBD, logits_SBV
        num_rows = len(hidden_BD)
        told_S2B = self._exchange.receive([((2, num_rows), torch.float32)] * len(self._sent))
        numbers_S2B = torch.stack([_numbers(self._score_of(0, hidden_BD), hidden_BD), *told_S2B])
        all_SBV = [logits_BV, *self._logits(self._receive_rows(num_rows))]
        return self._widen(fuse(self._weights_of(numbers_S2B), all_SBV, self._num_shared_ids), logits_BV)

    def _receive_rows(self, num_rows: int) -> list[Tensor]:
        return self._exchange.receive([((num_rows, own.width), own.dtype) for own in self._sent])

    def _hidden(self, sent_SBX: Sequence[Tensor]) -> Sequence[Tensor]:
        """The followers' states [B, D] of what was received of so many rows; nothing if they do not come."""
        if self._kinds == ("logits", "hidden"):
            num_rows = len(sent_SBX[0])
            return self._exchange.receive([((num_rows, own.hidden_size), own.hidden_dtype) for own in self._sent])
        return sent_SBX if self._kinds == ("hidden",) else ()

    def _logits(self, sent_SBX: Sequence[Tensor]) -> list[Tensor]:
        return [
            own.logits_of(sent_BX)[:, : self._num_shared_ids] for own, sent_BX in zip(self._sent, sent_SBX, strict=True)
        ]

    def _weights_of(self, numbers_S2B: Tensor) -> Tensor:
        return self._agree(numbers_S2B[:, 0].softmax(dim=0))


class SendingMixer:
    """A follower's: it sends what the leader asks for, and mixes nothing."""

    num_bytes = 0

    def __init__(self, gate: Gate, index: int, num_shared_ids: int, kinds: Kinds, exchange: Exchange) -> None:
        """`index` is the specialist's place in the fusion file; of each row it sends `kinds`."""
        self._gate, self._index, self._num_shared_ids = gate, index, num_shared_ids
        self._kinds, self._exchange = kinds, exchange

    def send(self, own: Rows, ending: Sequence[Row], clock: StepClock) -> None:
        """This specialist's part of the rows that end in a token, in the order that all ranks know."""
        indices_B = own.indices_of(ending)
        hidden_BD = take(own.hidden_RD, indices_B)
        told_2F = _as_numbers(clock.take(_NUM_SPANS), hidden_BD.device)
        self._exchange.send(torch.cat([self._own_numbers(hidden_BD), told_2F], dim=1))
        logits_BV = take(own.logits_RV, indices_B) if "logits" in self._kinds else None
        self._send_rows(self._kinds, hidden_BD, logits_BV)

    def mix(self, hidden_SBD: Sequence[Tensor], logits_SBV: Sequence[Tensor]) -> None:
        """Send what the leader mixes."""
        (hidden_BD,), (logits_BV,) = hidden_SBD, logits_SBV
        self._exchange.send(self._own_numbers(hidden_BD))
        self._send_rows(self._kinds[:1], hidden_BD, logits_BV)

    def _own_numbers(self, hidden_BD: Tensor) -> Tensor:
        return _numbers(self._gate.score_of(self._index, hidden_BD), hidden_BD)

    def _send_rows(self, kinds: Kinds, hidden_BD: Tensor, logits_BV: Tensor | None) -> None:
        if "logits" in kinds:
            assert logits_BV is not None
            self._exchange.send(logits_BV[:, : self._num_shared_ids])
        if "hidden" in kinds:
            self._exchange.send(hidden_BD)


def _numbers(scores_B: Tensor, hidden_BD: Tensor) -> Tensor:
    """What is told of each row [2, B], float32: the gate's score and the sum of the hidden state."""
    return torch.stack([scores_B, hidden_BD.sum(dim=-1, dtype=torch.float32)])


def _as_numbers(spans: Sequence[Span], device: torch.device) -> Tensor:
    """Times as float32 [2, F]: seconds, and which part of a step it was, from 1."""
    none = [0.0] * (_NUM_SPANS - len(spans))
    told_2F = [span.seconds for span in spans] + none, [1.0 + _PARTS.index(span.part) for span in spans] + none
    return to_device(told_2F, device, torch.float32)


def _spans(name: str, told_2F: Tensor) -> list[Span]:
    return [Span(_PARTS[int(part) - 1], name, seconds) for seconds, part in told_2F.T.tolist() if part]
