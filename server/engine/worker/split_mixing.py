"""Gate and mixture where each specialist has ranks of its own: followers send what the leader mixes.

For every row that ends in a token a follower sends its part of the gate's scores (one number; `width` of a joint gate),
the sum of the hidden state, and its logits in their own type, or else its hidden state
(`server/engine/worker/output_heads.py`); where a trained head drafts, which looks at the states, it sends both. The
arithmetic, and its order, is that of `server/engine/worker/mixing.py`. With the numbers go the times that the follower
has measured. Knows tensors and what their rows are, not the schedule.

Shapes: S specialists, B rows that end in a token, D hidden size, V vocabulary, P numbers of a part, Q = P + 1 numbers
of a row, F spans of a follower, N numbers that it sends at once.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ultrafuser.gating.model.mixture import fuse
from ultrafuser.server.engine.shared.row import Row
from ultrafuser.server.engine.shared.step import Span
from ultrafuser.server.engine.worker.exchange import Exchange
from ultrafuser.server.engine.worker.gate_parts import GateParts
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
        parts: GateParts,
        num_shared_ids: int,
        names: Sequence[str],
        kinds: Kinds,
        exchange: Exchange,
        sent: Sequence[Sent],
    ) -> None:
        """`parts` are the leader's. Of each row every follower sends `kinds`, in the form of `sent`; `names` are those
        of all specialists."""
        super().__init__(parts, num_shared_ids)
        self._own, self._num_numbers = parts, parts.gate.part_size + 1
        self._names, self._kinds, self._exchange, self._sent = names, kinds, exchange, sent

    @property
    def num_bytes(self) -> int:
        """Of memory beside the gate."""
        return super().num_bytes + sum(own.num_bytes for own in self._sent)

    def fuse_into_leader(self, specialists: Sequence[Rows], ending: Sequence[Row], clock: StepClock) -> Mixed:
        """As for shared ranks, of the leader's rows and the followers'; `ending` in the order that all ranks know."""
        (own,) = specialists
        indices_B = own.indices_of(ending)
        hidden_BD = take(own.hidden_RD, indices_B)
        with clock.measure("gate"):
            own_BQ = _numbers(self._own.of([hidden_BD], ending), hidden_BD)
        with clock.measure("idle", self._names[0]):
            num_told = own_BQ.numel() + 2 * _NUM_SPANS
            told_SN = self._exchange.receive([((num_told,), torch.float32)] * len(self._sent))
        with clock.measure("exchange"):
            sent_SBX = self._receive_rows(len(ending))
            hidden_SBD = self._hidden(sent_SBX)
        with clock.measure("mix"):
            for name, told_N in zip(self._names[1:], told_SN, strict=True):
                clock.hear(told_N[own_BQ.numel() :].view(2, _NUM_SPANS), partial(_spans, name))
            numbers_SBQ = torch.stack([own_BQ, *(told_N[: own_BQ.numel()].view_as(own_BQ) for told_N in told_SN)])
            logits_SBV = [take(own.logits_RV, indices_B)[:, : self._num_shared_ids], *self._logits(sent_SBX)]
            # A sum is finite if the state is, and stands for it where that is looked at.
            sums_SB1 = [own_BQ[:, -1:].clone() for own_BQ in numbers_SBQ]  # aligned for a device
            fused = self._fuse(self._weights_of(numbers_SBQ), sums_SB1, logits_SBV, own.logits_RV, indices_B)
            return Mixed(*fused, [hidden_BD, *hidden_SBD])

    def mix(self, hidden_SBD: Sequence[Tensor], logits_SBV: Sequence[Tensor]) -> Tensor:
        """As for shared ranks, of the leader's rows and the followers'."""
        (hidden_BD,), (logits_BV,) = hidden_SBD, logits_SBV
        num_rows = len(hidden_BD)
        own_BQ = _numbers(self._own.of([hidden_BD]), hidden_BD)
        told_SBQ = self._exchange.receive([((num_rows, self._num_numbers), torch.float32)] * len(self._sent))
        weights_SB = self._weights_of(torch.stack([own_BQ, *told_SBQ]))
        all_SBV = [logits_BV, *self._logits(self._receive_rows(num_rows))]
        return self._widen(fuse(weights_SB, all_SBV, self._num_shared_ids, self._mixture), logits_BV)

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

    def _weights_of(self, numbers_SBQ: Tensor) -> Tensor:
        return self._agree(self._own.gate.weights_of(numbers_SBQ[..., :-1]))


class SendingMixer:
    """A follower's: it sends what the leader asks for, and mixes nothing."""

    def __init__(self, parts: GateParts, num_shared_ids: int, kinds: Kinds, exchange: Exchange) -> None:
        """`parts` are this specialist's; of each row it sends `kinds`."""
        self._parts, self._num_shared_ids = parts, num_shared_ids
        self._kinds, self._exchange = kinds, exchange

    @property
    def num_bytes(self) -> int:
        """Of memory beside the gate."""
        return self._parts.num_bytes

    def forget(self, requests: Iterable[str]) -> None:
        """Drop what the gate remembers of requests that have ended."""
        self._parts.forget(requests)

    def send(self, own: Rows, ending: Sequence[Row], clock: StepClock) -> None:
        """This specialist's part of the rows that end in a token, in the order that all ranks know."""
        indices_B = own.indices_of(ending)
        hidden_BD = take(own.hidden_RD, indices_B)
        told_2F = _as_numbers(clock.take(_NUM_SPANS), hidden_BD.device)
        own_BQ = _numbers(self._parts.of([hidden_BD], ending), hidden_BD)
        self._exchange.send(torch.cat([own_BQ.flatten(), told_2F.flatten()]))
        logits_BV = take(own.logits_RV, indices_B) if "logits" in self._kinds else None
        self._send_rows(self._kinds, hidden_BD, logits_BV)

    def mix(self, hidden_SBD: Sequence[Tensor], logits_SBV: Sequence[Tensor]) -> None:
        """Send what the leader mixes."""
        (hidden_BD,), (logits_BV,) = hidden_SBD, logits_SBV
        self._exchange.send(_numbers(self._parts.of([hidden_BD]), hidden_BD))
        self._send_rows(self._kinds[:1], hidden_BD, logits_BV)

    def _send_rows(self, kinds: Kinds, hidden_BD: Tensor, logits_BV: Tensor | None) -> None:
        if "logits" in kinds:
            assert logits_BV is not None
            self._exchange.send(logits_BV[:, : self._num_shared_ids])
        if "hidden" in kinds:
            self._exchange.send(hidden_BD)


def _numbers(part_1BP: Tensor, hidden_BD: Tensor) -> Tensor:
    """What is told of each row [B, Q], float32: the specialist's part, and the sum of its hidden state."""
    return torch.cat([part_1BP[0], hidden_BD.sum(dim=-1, keepdim=True, dtype=torch.float32)], dim=1)


def _as_numbers(spans: Sequence[Span], device: torch.device) -> Tensor:
    """Times as float32 [2, F]: seconds, and which part of a step it was, from 1."""
    none = [0.0] * (_NUM_SPANS - len(spans))
    told_2F = [span.seconds for span in spans] + none, [1.0 + _PARTS.index(span.part) for span in spans] + none
    return to_device(told_2F, device, torch.float32)


def _spans(name: str, told_2F: Tensor) -> list[Span]:
    return [Span(_PARTS[int(part) - 1], name, seconds) for seconds, part in told_2F.T.tolist() if part]
