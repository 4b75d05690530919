"""What a rank's specialists add to the gate's scores, and what a smoothed gate remembers of each response.

A smoothed gate looks at the mean of the states that predicted a response's earlier tokens (`Gate.remember`). It is kept
for each request from its first token until it ends, also while it is preempted: as it stood before each row of the
request's last step and behind the last one, since how many of a step's tokens hold is known when the next one begins.
Every response begins with none. Knows rows and states; neither logits nor who sends what where.

Shapes: S specialists of this rank, B rows that end in a token, D hidden size, W width of the gate, P numbers of a part,
N memories that are kept.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ultrafuser.gating.model.gate import Gate
from ultrafuser.server.engine.shared.row import Row
from ultrafuser.server.engine.worker.transfer import to_device

_NONE = 0
"""Place of the memory before a response's first token."""


class GateParts:
    """A gate, as far as one rank's specialists are concerned."""

    def __init__(self, gate: Gate, indices: Sequence[int], num_requests: int, num_rows: int) -> None:
        """`indices` are the specialists' places in the fusion file; so many requests run at once, with at most so many
        rows each."""
        self.gate = gate
        self._indices = indices
        self._memories = Memories(gate, len(indices), num_requests, num_rows) if gate.kind.smoothed else None

    def of(self, hidden_SBD: Sequence[Tensor], rows: Sequence[Row] | None = None) -> Tensor:
        """Parts [S, B, P] for `Gate.weights_of`.

        `rows` are those of a step that end in a token, each once, a request's side by side and by position; without
        them every position is the first of a response.
        """
        pairs = list(zip(self._indices, hidden_SBD, strict=True))
        memories: Sequence[Tensor | None] = [None] * len(pairs)
        if self._memories is not None and rows is not None:
            added_SBW = torch.stack([self.gate.added_by(index, hidden_BD) for index, hidden_BD in pairs])
            memories = self._memories.go_on(rows, added_SBW).unbind()
        return torch.stack([self.gate.part_of(*own, memory) for own, memory in zip(pairs, memories, strict=True)])

    def forget(self, requests: Iterable[str]) -> None:
        """Drop what is remembered of requests that have ended."""
        if self._memories is not None:
            self._memories.forget(requests)

    @property
    def num_bytes(self) -> int:
        """Of memory beside the gate."""
        return 0 if self._memories is None else self._memories.num_bytes


class _Kept(NamedTuple):
    """What is kept of one request."""

    place: int
    """Of the first of its memories; the others are behind it."""

    position: int
    """Of the response, of the first: see `Row`."""

    num_rows: int
    """Behind how many rows there is one, too."""


class Memories:
    """A smoothed gate's memories, on the device: of as many requests as can run, and more if some are preempted."""

    def __init__(self, gate: Gate, num_specialists: int, num_requests: int, num_rows: int) -> None:
        self._decay = float(gate.decay.detach())
        self._num_places = 1 + num_rows
        self._kept: dict[str, _Kept] = {}
        self._free: list[int] = []
        # Written, not only reserved: on a CPU what vLLM finds taken is what was touched.
        self._kept_SNW = torch.full((num_specialists, 1, gate.width), 0.0, device=gate.decay_logit.device)
        self._make_room(num_requests)

    @property
    def num_bytes(self) -> int:
        """Of all places."""
        return self._kept_SNW.nbytes

    def go_on(self, rows: Sequence[Row], added_SBW: Tensor) -> Tensor:
        """The memories [S, B, W] before these rows; `added_SBW` is what each of them adds for those behind it."""
        counts = Counter(row.request for row in rows)
        moves: list[tuple[int, int]] = []
        turns: list[list[int]] = [[] for _ in range(max(counts.values()))]
        places: list[int] = []
        first = rows[0]
        for number, row in enumerate(rows):
            if not row.is_draft:
                first = row
                moves.append(self._begin(row, counts[row.request]))
            index = row.position - first.position
            turns[index].append(number)
            places.append(moves[-1][1] + index)
        device = added_SBW.device
        before_R, begin_R = to_device([*zip(*moves, strict=True)], device)
        self._kept_SNW.index_copy_(1, begin_R, self._kept_SNW.index_select(1, before_R))
        by_turn = [number for turn in turns for number in turn]
        numbers_B, places_B = to_device([by_turn, [places[number] for number in by_turn]], device)
        lengths = [len(turn) for turn in turns]
        for own_T, place_T in zip(numbers_B.split(lengths), places_B.split(lengths), strict=True):
            kept_STW = self._decay * self._kept_SNW.index_select(1, place_T)
            kept_STW += (1 - self._decay) * added_SBW.index_select(1, own_T)
            self._kept_SNW.index_copy_(1, place_T + 1, kept_STW)
        return self._kept_SNW.index_select(1, to_device(places, device))

    def _begin(self, first: Row, num_rows: int) -> tuple[int, int]:
        """Where the memory before a request's first row of a step is, and where it is to be."""
        kept = self._kept.get(first.request)
        if kept is None:
            if not self._free:
                self._make_room(len(self._kept))
            kept = _Kept(self._free.pop(), first.position, -1)
        num_held = first.position - kept.position
        assert first.position == 0 or 0 <= num_held <= kept.num_rows, f"{first}: its memory is not kept"
        self._kept[first.request] = _Kept(kept.place, first.position, num_rows)
        return (kept.place + num_held if first.position else _NONE), kept.place

    def _make_room(self, num_requests: int) -> None:
        num_specialists, num_before, width = self._kept_SNW.shape
        more_SNW = self._kept_SNW.new_full((num_specialists, num_requests * self._num_places, width), 0.0)
        self._kept_SNW = torch.cat([self._kept_SNW, more_SNW], dim=1)
        self._free += range(num_before, self._kept_SNW.shape[1], self._num_places)

    def forget(self, requests: Iterable[str]) -> None:
        """Drop what is kept of these requests, if anything is."""
        for request in requests:
            if (kept := self._kept.pop(request, None)) is not None:
                self._free.append(kept.place)
