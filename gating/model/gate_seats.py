"""A trained gate with a seat more, or one less: what of it belongs to one specialist, and what to all of them.

Nothing learns here. A newcomer's own numbers begin where they say nothing of its states; what is the others' stays, bit
for bit. Knows the gate's module; knows no files, no fusions and no training.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ultrafuser.gating.model.gate import Gate


class Part(NamedTuple):
    """Some rows or columns of a parameter, as `Tensor.narrow` takes them."""

    dim: int
    begin: int
    length: int


def own_parts(gate: Gate, index: int) -> dict[str, Part]:
    """What of which parameter is one specialist's alone, by name; empty where all of the gate is everybody's.

    Of a joint gate its columns of the first layer and of the memory, and its row of the last one; its projection, where
    states are projected; its temperature and bias of a scaled one.
    """
    one, own = Part(0, index, 1), {}
    if gate.kind.joint:
        columns = Part(1, sum(gate.hidden_sizes[:index]), gate.hidden_sizes[index])
        own = {"hidden.weight": columns, "score.weight": one, "score.bias": one}
        if gate.kind.smoothed:
            own["memory.weight"] = columns
    if gate.projected_size is not None:
        own[_projection(index)] = Part(0, 0, gate.projected_size)
    if gate.kind.scaled:
        own |= {"log_temperatures": one, "biases": one}
    return own


def num_own(gate: Gate, index: int) -> int:
    """How many numbers are one specialist's alone."""
    parameters = dict(gate.named_parameters())
    return sum(parameters[name].narrow(*part).numel() for name, part in own_parts(gate, index).items())


@torch.no_grad()
def widened(gate: Gate, hidden_size: int) -> Gate:
    """The gate with one specialist more, the last.

    The others' scores of their own states are what they were. The newcomer is scored by the network that all share; of
    its own it has zeros (a joint gate's row and columns, a projection), so that its score is the same at every token,
    and the mean of the others' biases and log temperatures. Where the others' states are not projected and its size is
    another, they are from now on: theirs by the identity.
    """
    is_same = gate.kind.joint or hidden_size == gate.hidden_sizes[0]
    projected_size = gate.projected_size or (None if is_same else gate.hidden_sizes[0])
    sizes = (*gate.hidden_sizes, hidden_size)
    wider = Gate(sizes, gate.width, gate.kind, projected_size).to(gate.hidden.weight.device)
    before = dict(gate.named_parameters())
    for name, parameter in wider.named_parameters():
        if name in before:
            _fill(parameter, before[name])
        elif name == _projection(len(sizes) - 1):
            parameter.zero_()
        else:
            torch.nn.init.eye_(parameter)
    return wider


@torch.no_grad()
def without(gate: Gate, index: int) -> Gate:
    """The gate with one specialist less: of all but a joint one the others' weights stay in proportion.

    States stay projected to the size that the gate was trained with, whoever is left.
    """
    assert len(gate.hidden_sizes) > 1
    sizes = gate.hidden_sizes[:index] + gate.hidden_sizes[index + 1 :]
    state, own = gate.state_dict(), own_parts(gate, index)
    projections = [state.pop(_projection(place)) for place in range(len(gate.projections))]
    kept = {name: _cut(tensor, own[name]) if name in own else tensor for name, tensor in state.items()}
    rest = projections[:index] + projections[index + 1 :]
    kept |= {_projection(place): tensor for place, tensor in enumerate(rest)}
    smaller = Gate(sizes, gate.width, gate.kind, gate.projected_size)
    smaller.load_state_dict(kept)
    return smaller


def _projection(index: int) -> str:
    return f"projections.{index}.weight"


def _fill(parameter: Tensor, before: Tensor) -> None:
    """What was there first; then of a list of numbers their mean, of a matrix zeros."""
    parameter.fill_(before.mean() if parameter.dim() == 1 else 0)
    parameter[tuple(slice(size) for size in before.shape)] = before


def _cut(tensor: Tensor, part: Part) -> Tensor:
    """The tensor without a part of it."""
    end = part.begin + part.length
    after = tensor.narrow(part.dim, end, tensor.shape[part.dim] - end)
    return torch.cat([tensor.narrow(part.dim, 0, part.begin), after], dim=part.dim)
