"""What a rank computes of a gate in parts, step by step, is what the gate says of whole responses at once."""

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from ultrafuser.gating.model.gate import Gate, fresh_gate
from ultrafuser.gating.model.gate_kind import CHANGES, PAPER, GateKind
from ultrafuser.server.engine.shared.row import Row
from ultrafuser.server.engine.worker.gate_parts import GateParts

SIZES = (6, 4, 5)
LENGTH = 12
ALL = "+".join(CHANGES)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    """As a worker computes."""
    with torch.inference_mode():
        yield


def gate_of(kind: str) -> Gate:
    return fresh_gate(SIZES, width=8, seed=1, kind=GateKind.parse(kind))


class Responses:
    """States of responses by request and position; other ones where a draft was wrong."""

    def __init__(self, gate: Gate, requests: Sequence[str]) -> None:
        generator = torch.Generator().manual_seed(0)
        self._gate = gate
        self._true = {own: [torch.randn(LENGTH, size, generator=generator) for size in SIZES] for own in requests}
        self._wrong = [torch.randn(size, generator=generator) for size in SIZES]

    def states(self, rows: Sequence[Row], num_true: int = 1) -> list[Tensor]:
        """Of a step's rows, of which so many of each request read tokens that hold."""
        first = {row.request: row.position for row in reversed(rows)}
        return [
            torch.stack(
                [
                    self._true[row.request][index][row.position]
                    if row.position < first[row.request] + num_true
                    else self._wrong[index]
                    for row in rows
                ]
            )
            for index in range(len(SIZES))
        ]

    def weights(self, request: str) -> Tensor:
        """The gate's [S, T] of one whole response."""
        return self._gate(self._true[request], torch.zeros(LENGTH, dtype=torch.int64))


def rows_of(request: str, position: int, count: int = 1) -> list[Row]:
    return [Row(request, position + index, is_draft=index > 0, slot=0) for index in range(count)]


def step(gate: Gate, parts: GateParts, responses: Responses, rows: Sequence[Row], num_true: int = 1) -> Tensor:
    """The weights [S, B]."""
    return gate.weights_of(parts.of(responses.states(rows, num_true), rows))


@pytest.mark.parametrize("kind", [PAPER, *CHANGES, ALL])
@pytest.mark.parametrize("num_rows", [1, 3])
def test_steps_with_some_drafts_right_give_the_weights_of_whole_responses(kind: str, num_rows: int) -> None:
    """More requests than can run at once, each at its own position, some left out of a step (preempted)."""
    gate = gate_of(kind)
    requests = ["a", "b", "c", "d", "e"]
    parts, responses = GateParts(gate, range(3), 2, num_rows), Responses(gate, requests)
    positions = dict.fromkeys(requests, 0)
    for number in range(40):
        going = [own for place, own in enumerate(requests) if (number + place) % 3 and positions[own] < LENGTH]
        num_true = 1 + number % num_rows
        rows = [row for own in going for row in rows_of(own, positions[own], min(num_rows, LENGTH - positions[own]))]
        if not rows:
            continue
        weights_SB = step(gate, parts, responses, rows, num_true)
        for place, row in enumerate(rows):
            if row.position < positions[row.request] + num_true:
                wanted_S = responses.weights(row.request)[:, row.position]
                torch.testing.assert_close(weights_SB[:, place], wanted_S, atol=1e-6, rtol=0)
        for own in going:
            positions[own] = min(positions[own] + num_true, LENGTH)
    assert set(positions.values()) == {LENGTH}


@pytest.mark.parametrize("kind", [PAPER, *CHANGES, ALL])
def test_ranks_that_have_a_specialist_each_give_the_same_parts(kind: str) -> None:
    gate, requests = gate_of(kind), ["a", "b"]
    responses = Responses(gate, requests)
    together = GateParts(gate, range(3), 2, 1)
    apart = [GateParts(gate, [index], 2, 1) for index in range(3)]
    for position in range(4):
        rows = [*rows_of("b", position), *rows_of("a", position)]
        states = responses.states(rows)
        own = [parts.of([state], rows)[0] for parts, state in zip(apart, states, strict=True)]
        torch.testing.assert_close(torch.stack(own), together.of(states, rows), atol=1e-6, rtol=0)


def test_without_rows_every_position_is_the_first_of_a_response() -> None:
    gate = gate_of("smoothed")
    parts, responses = GateParts(gate, range(3), 1, 1), Responses(gate, ["a"])
    states = responses.states(rows_of("a", 0, 3), 3)
    torch.testing.assert_close(gate.weights_of(parts.of(states)), gate(states))


def test_a_request_of_a_name_that_was_there_before_begins_anew() -> None:
    """One that was forgotten, and one whose end nobody told of."""
    gate = gate_of("smoothed")
    responses = Responses(gate, ["a"])
    parts = GateParts(gate, range(3), 1, 1)
    for is_told in (False, True):
        for position in range(3):
            weights_S1 = step(gate, parts, responses, rows_of("a", position))
            torch.testing.assert_close(weights_S1[:, 0], responses.weights("a")[:, position], atol=1e-6, rtol=0)
        if is_told:
            parts.forget(["a", "never seen"])
    with pytest.raises(AssertionError, match="its memory is not kept"):
        step(gate, parts, responses, rows_of("a", 3))


def test_a_position_that_no_step_led_to_is_an_error() -> None:
    """Another request's memory would be read."""
    gate = gate_of("smoothed")
    responses, parts = Responses(gate, ["a"]), GateParts(gate, range(3), 2, 2)
    step(gate, parts, responses, rows_of("a", 0))
    step(gate, parts, responses, rows_of("a", 1, 2))
    with pytest.raises(AssertionError, match="its memory is not kept"):
        step(gate, parts, responses, rows_of("a", 4))


def test_memory_is_bounded_by_the_requests_that_run_and_those_that_are_preempted() -> None:
    gate = gate_of("smoothed")
    parts, responses = GateParts(gate, range(3), 4, 3), Responses(gate, [str(number) for number in range(100)])
    own_bytes = 3 * 8 * 4  # specialists, width, float32
    assert parts.num_bytes == (1 + 4 * (1 + 3)) * own_bytes
    for number in range(100):
        step(gate, parts, responses, rows_of(str(number), 0, 3))
        if number >= 3:
            parts.forget([str(number - 3)])
    assert parts.num_bytes == (1 + 4 * (1 + 3)) * own_bytes, "places are used again"
    for number in range(5):
        step(gate, parts, responses, rows_of(str(number), 0))
    assert parts.num_bytes == (1 + 8 * (1 + 3)) * own_bytes
    assert GateParts(gate_of(PAPER), range(3), 4, 3).num_bytes == 0
